from dataclasses import replace

import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy_tools.comparison.artifact_evaluator import integer_share


def test_integer_work_counts_multiply_accumulates_and_timesteps(chain):
    artifact = Artifact.load(chain.artifact)
    assert integer_share(artifact, [999.0, 0.0]) == 1.0
    name = next(iter(artifact.sites))
    floating = artifact.sites | {name: replace(artifact.sites[name], activation=None)}
    assert 0 < integer_share(replace(artifact, sites=floating), [0.0]) < 1
    relaxed = torch.zeros(artifact.num_train_timesteps, dtype=torch.uint8)
    relaxed[500:] = 1
    assert integer_share(replace(artifact, relaxed=relaxed), [999.0, 749.0, 499.0, 0.0]) == 0.5
    narrow = {name: replace(site, relaxed_activation=site.activation) for name, site in artifact.sites.items()}
    assert integer_share(replace(artifact, relaxed=relaxed, sites=narrow), [999.0, 0.0]) == 1.0

from dataclasses import replace

import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.network.layer_costs import model_work
from edm_deploy_tools.comparison.artifact_evaluator import int4_share, integer_share
from tests.conftest import artifact_by_hand


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


def test_work_in_int4_is_that_of_layers_whose_codes_all_fit():
    artifact = artifact_by_hand()
    whole = int4_share(artifact, [0.0])
    assert 0 < whole < integer_share(artifact, [0.0]) == 1.0  # first and last layer are W8A8
    name = "mid_block.resnets.0.conv1"
    codes = artifact.sites[name].codes.clone()
    codes[0, 0, 0, 0] = 15  # one channel of 5 bits
    bits = torch.full((len(codes),), 4, dtype=torch.uint8)
    bits[0] = 5
    mixed = replace(artifact, sites=artifact.sites | {name: replace(artifact.sites[name], codes=codes, channel_bits=bits)})
    work = model_work(artifact.family_object, artifact.config).sites
    share = work[name].macs / sum(site.macs for site in work.values())
    assert int4_share(mixed, [0.0]) == pytest.approx(whole - share, abs=0.002)  # percentages with one digit
    assert integer_share(mixed, [0.0]) == 1.0
    relaxed = torch.zeros(artifact.num_train_timesteps, dtype=torch.uint8)
    relaxed[500:] = 1
    assert int4_share(replace(artifact, relaxed=relaxed), [999.0, 0.0]) == pytest.approx(whole / 2)

from __future__ import annotations

import torch

from edm_deploy.pipelines.guidance import Conditioning
from edm_deploy_tools.evaluation import denoisers
from edm_deploy_tools.evaluation.denoisers import denoise_of_engine, denoise_of_source
from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings, reference_trajectory
from tests.tools.evaluation.test_trajectory_error import tiny


def test_a_batch_beyond_the_largest_is_split_with_its_conditioning(monkeypatch):
    source = tiny("dit")
    trajectory = reference_trajectory(source, EvaluationSettings(samples=5, steps=1, guidance=3.0))
    denoise, timestep = denoise_of_source(source, trajectory.conditioning), torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
    whole = denoise(trajectory.noise, timestep)
    monkeypatch.setattr(denoisers, "FORWARD_BATCH", 2)
    torch.testing.assert_close(denoise(trajectory.noise, timestep), whole, atol=1e-4, rtol=1e-4)


def test_a_batch_beyond_the_profile_is_split(chain):
    denoise = denoise_of_engine(chain.engine, Conditioning())
    sample, timesteps = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(0.0, 110.0, 10.0)
    whole = denoise(sample, timesteps)
    assert whole.shape == sample.shape
    # The profile is 1:4:8, so the ninth sample begins the second piece. Float sums may differ with the batch; codes rarely flip.
    torch.testing.assert_close(whole[8:], denoise(sample[8:], timesteps[8:]), rtol=1e-4, atol=1e-4)

from __future__ import annotations

import math

import pytest
import torch

from edm_deploy.artifact import Artifact
from edm_deploy.pipelines import load_source
from edm_deploy_tools.walk import Setup, denoise_of_artifact, denoise_of_engine, denoise_of_source, distance, psnr, relative_error, walk


@pytest.fixture(scope="module")
def reference(chain):
    return walk(load_source(chain.model), Setup(samples=3, steps=4, seed=1))


def test_relative_error_is_squared_and_relative():
    assert relative_error(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0])) == pytest.approx(0.25)


def test_psnr_counts_a_range_of_two_and_clamps():
    # Everywhere 0.2 apart: -10 log10(0.04 / 4) = 20 dB. What lies beyond 1 is 1.
    assert psnr(torch.full((4,), 0.2), torch.zeros(4)) == pytest.approx(20.0, abs=1e-5)
    assert psnr(torch.full((4,), 7.0), torch.ones(4)) > 120


def test_the_float_model_is_no_distance_from_itself(reference):
    far = distance(denoise_of_source(reference.source, {}), reference)
    assert far.noise_errors == (0.0, 0.0, 0.0, 0.0)
    assert far.psnr > 120


def test_an_artifact_is_some_distance_away(chain, reference):
    far = distance(denoise_of_artifact(Artifact.load(chain.artifact), {}), reference)
    assert len(far.noise_errors) == 4
    assert 0 < far.noise_error < 0.5
    assert math.isfinite(far.psnr)


def test_an_engine_takes_a_batch_beyond_its_profile_in_pieces(chain):
    denoise = denoise_of_engine(chain.engine, {})
    sample, timesteps = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(0.0, 110.0, 10.0)
    whole = denoise(sample, timesteps)
    assert whole.shape == sample.shape
    # The profile is 1:4:8, so the ninth sample begins the second piece. Float sums may differ with the batch; codes rarely flip.
    torch.testing.assert_close(whole[8:], denoise(sample[8:], timesteps[8:]), rtol=1e-4, atol=1e-4)


def test_the_same_seed_walks_the_same_way(reference):
    again = walk(reference.source, reference.setup)
    assert torch.equal(again.final, reference.final)

from __future__ import annotations

import pytest
import torch
from torch import nn

from edm_deploy.pipelines.noise_schedules import DiffusionSchedule
from edm_deploy.pipelines.step_weights import step_weights, weights_rounded

ALPHAS = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0], dtype=torch.float64)


class Skewed(nn.Module):
    """A convolution of two weights, so that rounding changes the smaller one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, (1, 2), bias=False)
        self.layer.weight.data = torch.tensor([[[[1.0, 0.03]]]])

    def forward(self, sample, timestep):
        return self.layer(nn.functional.pad(sample, (0, 1)))


def schedule():
    return DiffusionSchedule(torch.arange(len(ALPHAS) - 1).flip(0) * 100, ALPHAS, "epsilon", None)


def test_the_weight_of_the_last_step_is_the_factor_of_the_scheduler_alone():
    model = Skewed()
    weights = step_weights(model, model, schedule(), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert weights.shape == (7,)
    assert bool((weights > 0).all())
    now, then = ALPHAS[-2], ALPHAS[-1]
    coefficient = (1 - then).sqrt() - (then * (1 - now) / now).sqrt()
    assert float(weights[-1]) == pytest.approx(float(coefficient**2), rel=1e-3)


def test_a_weight_is_the_change_of_the_final_sample_for_an_error_at_that_step_alone():
    model, steps = Skewed(), schedule()
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = step_weights(model, model, steps, noise)

    def final(perturbed):
        sample, error = noise, None
        for position in range(7):
            prediction = model(sample, None)
            if position == perturbed:
                with weights_rounded(model):
                    error, prediction = model(sample, None) - prediction, model(sample, None)
            sample = steps.previous(sample, prediction, torch.full((2,), position), torch.zeros_like(noise), 0.0)
        return sample, error

    with torch.no_grad():
        (exact, _), (moved, error) = final(None), final(0)
    assert float(weights[0]) == pytest.approx(float((moved - exact).square().sum() / error.square().sum()), rel=1e-4)


def test_weights_are_rounded_within_the_context_and_the_same_tensors_after_it():
    model = Skewed()
    before = model.layer.weight
    sample = torch.ones(1, 1, 1, 2)
    exact = model(sample, None)
    with weights_rounded(model, bits=3):  # 0.03 is below half of a third
        rounded = model(sample, None)
        assert model.layer.weight is before  # only while the layer runs
    assert not torch.equal(rounded, exact)
    assert torch.equal(model(sample, None), exact)


def test_a_layer_that_fails_has_its_weight_back():
    model = Skewed()
    before = model.layer.weight
    with weights_rounded(model), pytest.raises(RuntimeError):
        model(torch.ones(1, 5, 1, 2), None)
    assert model.layer.weight is before

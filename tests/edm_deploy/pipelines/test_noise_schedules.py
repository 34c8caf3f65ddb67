from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.pipelines.noise_schedules import FlowSchedule, calibrated_timesteps, schedule_of


def test_rows_are_the_timesteps_of_the_models_pipeline():
    """FLUX's pipeline takes four equal steps from 1; the scheduler alone would end next to 0, a timestep that no sample reaches."""
    sigmas = family_named("flux-transformer-2d").sigmas(4)
    assert sigmas == (1.0, 0.75, 0.5, 0.25)
    assert calibrated_timesteps(FlowMatchEulerDiscreteScheduler(), 4, sigmas).tolist() == [250, 500, 750, 999]
    assert calibrated_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), 2, (1.0, 0.5)).tolist() == [750, 999]  # 3 s / (1 + 2 s)


def test_rows_are_the_timesteps_of_that_many_steps_ascending():
    assert calibrated_timesteps(DDIMScheduler(num_train_timesteps=1000), 4).tolist() == [0, 250, 500, 750]


def test_fractional_timesteps_are_rounded():
    timesteps = calibrated_timesteps(EulerDiscreteScheduler(num_train_timesteps=1000), 4)
    assert timesteps.dtype == torch.int32
    assert timesteps.tolist() == [0, 333, 666, 999]


def test_more_rows_than_timesteps_are_refused():
    with pytest.raises(InputError, match="rows is 200, but the model's schedule has 100 timesteps"):
        calibrated_timesteps(DDIMScheduler(num_train_timesteps=100), 200)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_is_that_of_the_vendors_ddim(prediction_type, clip_sample, eta):
    scheduler = DDIMScheduler(num_train_timesteps=1000, prediction_type=prediction_type, clip_sample=clip_sample, set_alpha_to_one=True)
    scheduler.set_timesteps(5)
    schedule = schedule_of(scheduler, calibrated_timesteps(scheduler, 5))
    generator = torch.Generator().manual_seed(0)
    sample, prediction, noise = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(3))
    ours = schedule.previous(sample, prediction, torch.arange(5), noise, eta)  # each sample at another timestep
    for position, timestep in enumerate(scheduler.timesteps):
        one = slice(position, position + 1)
        theirs = scheduler.step(prediction[one], timestep, sample[one], eta=eta, variance_noise=noise[one] if eta else None).prev_sample
        torch.testing.assert_close(ours[one], theirs, rtol=2e-4, atol=2e-4)  # theirs takes roots in float32


def test_rows_of_a_flow_are_its_shifted_timesteps_within_the_table():
    assert calibrated_timesteps(FlowMatchEulerDiscreteScheduler(), 4).tolist() == [1, 334, 667, 999]
    shifted = calibrated_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), 4).tolist()
    assert shifted[-1] == 999 and all(a < b for a, b in pairwise(shifted))
    assert shifted[1] > 334  # a shift above 1 spends more steps where there is more noise


def test_a_dynamic_shift_is_that_of_the_largest_image():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15)
    rows = calibrated_timesteps(scheduler, 4)
    scheduler.set_timesteps(4, mu=1.15)
    assert rows.tolist() == [round(t) for t in scheduler.timesteps.clamp(max=999).flip(0).tolist()]


def test_a_flow_starts_at_sigma_one_and_ends_in_the_sample():
    schedule = schedule_of(FlowMatchEulerDiscreteScheduler(), torch.tensor([250, 500, 999], dtype=torch.int32))
    assert schedule.sigmas.tolist() == [1.0, 0.5, 0.25, 0.0]
    assert schedule.timesteps.tolist() == [1000.0, 500.0, 250.0]


def test_a_step_along_a_flow_by_hand():
    schedule = FlowSchedule(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), 1000)
    noise, clean = torch.tensor([[4.0], [4.0]]), torch.tensor([[2.0], [2.0]])
    sample = torch.tensor([[4.0], [3.0]])  # sigma 1, and sigma 0.5
    stepped = schedule.previous(sample, noise - clean, torch.tensor([0, 1]), torch.zeros(2, 1), 0.0)
    assert stepped.tolist() == [[3.0], [2.0]]
    fresh = schedule.previous(sample, noise - clean, torch.tensor([0, 1]), torch.full((2, 1), 8.0), 1.0)
    assert fresh.tolist() == [[5.0], [2.0]]  # half clean, half fresh noise; the last step ends in the clean sample


def test_a_step_along_a_flow_is_that_of_the_vendor():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = schedule_of(scheduler, calibrated_timesteps(scheduler, 5))
    scheduler.set_timesteps(sigmas=(schedule.sigmas[:-1] / (3 - 2 * schedule.sigmas[:-1])).tolist())  # what a shift of 3 makes them of
    generator = torch.Generator().manual_seed(0)
    sample, prediction = (torch.randn(5, 16, 8, generator=generator) for _ in range(2))
    ours = schedule.previous(sample, prediction, torch.arange(5), torch.zeros_like(sample), 0.0)  # each sample at another timestep
    for position, timestep in enumerate(scheduler.timesteps):
        one = slice(position, position + 1)
        theirs = scheduler.step(prediction[one], timestep, sample[one]).prev_sample
        torch.testing.assert_close(ours[one], theirs, rtol=1e-5, atol=1e-5)


def test_unsupported_schedulers_are_refused():
    with pytest.raises(UnsupportedError, match="FlowMatchEulerDiscreteScheduler with invert_sigmas"):
        schedule_of(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), torch.tensor([0, 500]))
    with pytest.raises(UnsupportedError, match="EDMEulerScheduler"):
        schedule_of(EDMEulerScheduler(), torch.tensor([0, 500]))

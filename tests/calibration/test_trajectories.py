import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from calibration.trajectories import Trajectories, calibrated_timesteps, noise_schedule
from edm_deploy.errors import InputError, UnsupportedError
from tests.calibration.tiny import tiny_source


def pool(size=10, rows=5, eta=0.0, kind="unet2d"):
    source = tiny_source(kind)
    return Trajectories(source, calibrated_timesteps(source.scheduler, rows), size=size, eta=eta, seed=0, device=torch.device("cpu"))


def test_rows_are_the_timesteps_of_that_many_steps_ascending():
    assert calibrated_timesteps(DDIMScheduler(num_train_timesteps=1000), 4).tolist() == [0, 250, 500, 750]


def test_fractional_timesteps_are_rounded():
    timesteps = calibrated_timesteps(EulerDiscreteScheduler(num_train_timesteps=1000), 4)
    assert timesteps.dtype == torch.int32
    assert timesteps.tolist() == [0, 333, 666, 999]


def test_more_rows_than_timesteps_are_refused():
    with pytest.raises(InputError, match="rows is 200, but the model's schedule has 100 timesteps"):
        calibrated_timesteps(DDIMScheduler(num_train_timesteps=100), 200)


def test_flow_matching_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="FlowMatchEulerDiscreteScheduler"):
        noise_schedule(FlowMatchEulerDiscreteScheduler(), torch.tensor([0, 500]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_is_that_of_the_vendors_ddim(prediction_type, clip_sample, eta):
    scheduler = DDIMScheduler(num_train_timesteps=1000, prediction_type=prediction_type, clip_sample=clip_sample, set_alpha_to_one=True)
    scheduler.set_timesteps(5)
    schedule = noise_schedule(scheduler, calibrated_timesteps(scheduler, 5))
    generator = torch.Generator().manual_seed(0)
    sample, prediction, noise = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(3))
    ours = schedule.previous(sample, prediction, torch.arange(5), noise, eta)  # each sample at another timestep
    for position, timestep in enumerate(scheduler.timesteps):
        one = slice(position, position + 1)
        theirs = scheduler.step(prediction[one], timestep, sample[one], eta=eta, variance_noise=noise[one] if eta else None).prev_sample
        torch.testing.assert_close(ours[one], theirs, rtol=2e-4, atol=2e-4)  # theirs takes roots in float32


def test_finished_samples_start_anew_from_noise():
    trajectories = pool(size=2, rows=2)
    for _ in range(2):
        batch = trajectories.take(2)
        trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))
    assert trajectories.position.tolist() == [0, 0]
    assert float(trajectories.sample.std()) == pytest.approx(1.0, abs=0.15)  # 384 normal numbers


def test_after_a_sweep_every_batch_holds_every_row_equally_often():
    trajectories = pool(size=10, rows=5)
    for _, batches in trajectories.sweep(4):
        for batch in batches:
            trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))
    for _ in range(7):
        batch = trajectories.take(5)
        assert len(set(batch.inputs["timestep"].tolist())) == 5
        trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))


def test_a_sweep_visits_every_row_once_from_noise_to_sample():
    trajectories = pool(size=3, rows=4)
    seen = []
    for row, batches in trajectories.sweep(2):
        seen.append((row, sum(len(batch.members) for batch in batches)))
        for batch in batches:
            trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))
    assert seen == [(3, 3), (2, 3), (1, 3), (0, 3)]


@pytest.mark.parametrize("kind", ["unet2d-classes", "unet2d-condition"])
def test_conditioning_travels_with_its_sample_and_changes_when_it_restarts(kind):
    trajectories = pool(size=4, rows=2, kind=kind)
    (name,) = trajectories.conditioning
    first = trajectories.take(4)
    trajectories.advance(first, torch.zeros_like(first.inputs["sample"]))
    second = trajectories.take(4)
    assert torch.equal(first.inputs[name], second.inputs[name])
    trajectories.advance(second, torch.zeros_like(second.inputs["sample"]))
    assert not torch.equal(first.inputs[name], trajectories.take(4).inputs[name])


def test_a_pool_goes_on_from_its_state_as_if_nothing_had_happened():
    def walk(trajectories, steps):
        for _ in range(steps):
            batch = trajectories.take(3)
            trajectories.advance(batch, batch.inputs["sample"] * 0.1)
        return trajectories

    whole = walk(pool(eta=1.0), 12)
    first = walk(pool(eta=1.0), 5)
    state = {name: value.clone() for name, value in first.state().items()}
    second = pool(eta=1.0)
    second.load_state(state)
    walk(second, 7)
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())

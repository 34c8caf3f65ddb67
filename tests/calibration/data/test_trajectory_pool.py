import pytest
import torch

from calibration.data.trajectory_pool import Trajectories
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from tests.calibration.tiny import tiny_source


def pool(size=10, rows=5, eta=0.0, kind="unet2d"):
    source = tiny_source(kind)
    return Trajectories(source, calibrated_timesteps(source.scheduler, rows), size=size, eta=eta, seed=0, device=torch.device("cpu"))


def test_finished_samples_restart_from_noise():
    trajectories = pool(size=2, rows=2)
    for _ in range(2):
        batch = trajectories.next_batch(2)
        trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))
    assert trajectories.position.tolist() == [0, 0]
    assert float(trajectories.sample.std()) == pytest.approx(1.0, abs=0.15)  # 384 normal numbers


def test_after_traversing_the_schedule_batches_are_balanced_over_the_rows():
    trajectories = pool(size=10, rows=5)
    for _, batches in trajectories.traverse_schedule(4):
        for batch in batches:
            trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))
    for _ in range(7):
        batch = trajectories.next_batch(5)
        assert len(set(batch.inputs["timestep"].tolist())) == 5
        trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))


def test_the_schedule_is_traversed_once_from_noise_to_sample():
    trajectories = pool(size=3, rows=4)
    seen = []
    for row, batches in trajectories.traverse_schedule(2):
        seen.append((row, sum(len(batch.indices) for batch in batches)))
        for batch in batches:
            trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))
    assert seen == [(3, 3), (2, 3), (1, 3), (0, 3)]


@pytest.mark.parametrize("kind", ["unet2d-classes", "unet2d-condition"])
def test_conditioning_stays_with_its_sample_until_it_restarts(kind):
    trajectories = pool(size=4, rows=2, kind=kind)
    (name,) = trajectories.conditioning
    first = trajectories.next_batch(4)
    still = torch.zeros_like(trajectories.sample)  # both halves' predictions combined, where the model is guided
    trajectories.advance(first, still)
    second = trajectories.next_batch(4)
    assert torch.equal(first.inputs[name], second.inputs[name])
    trajectories.advance(second, still)
    assert not torch.equal(first.inputs[name], trajectories.next_batch(4).inputs[name])


def test_a_pool_continues_bit_for_bit_from_its_state():
    def walk(trajectories, steps):
        for _ in range(steps):
            batch = trajectories.next_batch(3)
            trajectories.advance(batch, batch.inputs["sample"] * 0.1)
        return trajectories

    whole = walk(pool(eta=1.0), 12)
    first = walk(pool(eta=1.0), 5)
    state = {name: value.clone() for name, value in first.state().items()}
    second = pool(eta=1.0)
    second.load_state(state)
    walk(second, 7)
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())


def test_a_restarted_pool_has_other_noise():
    trajectories = pool(size=4, rows=3, kind="unet2d-classes")
    for _, batches in trajectories.traverse_schedule(4):
        for batch in batches:
            trajectories.advance(batch, torch.zeros_like(batch.inputs["sample"]))
    trajectories.next_batch(3)
    before = trajectories.sample.clone()
    trajectories.restart()
    assert trajectories.position.tolist() == [0, 0, 0, 0]
    assert trajectories.next_batch(2).indices.tolist() == [0, 1]
    assert not torch.equal(trajectories.sample, before)

import pytest
import torch

from edm_deploy.pipelines import SCHEDULERS, scheduler_named
from edm_deploy.sampling import last_sample, trajectory
from tests.conftest import SCHEDULER


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_every_scheduler_walks_any_number_of_steps(name, steps):
    scheduler = scheduler_named(name, SCHEDULER)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def denoise(sample, timestep):
        seen.append(timestep.tolist())
        return sample * 0.1

    walked = list(trajectory(denoise, scheduler, noise, steps=steps, generator=torch.Generator().manual_seed(1)))
    assert len(walked) == len(seen) >= steps
    assert all(len(set(timesteps)) == 1 and 0 <= timesteps[0] <= 999 for timesteps in seen)
    assert walked[-1].next_sample.isfinite().all()


def test_a_trajectory_of_ddim_is_that_of_diffusers_own_loop():
    from diffusers import DDIMScheduler

    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = last_sample(trajectory(lambda x, t: x.tanh(), scheduler_named("ddim", SCHEDULER), noise, steps=5))
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(5)
    theirs = noise
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(theirs.tanh(), timestep, theirs).prev_sample
    assert torch.equal(ours, theirs)


def test_options_that_a_scheduler_does_not_take_are_left_out():
    noise = torch.zeros(1, 3, 4, 4)
    last_sample(trajectory(lambda x, t: x, scheduler_named("euler", SCHEDULER), noise, steps=2, options={"eta": 1.0}))

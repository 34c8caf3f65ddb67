import pytest
import torch

from edm_deploy.pipelines.sampling import is_flow, last_sample, set_steps, trajectory
from edm_deploy.pipelines.schedulers import SCHEDULERS, scheduler_named, schedulers_for
from tests.conftest import FLOW_SCHEDULER, SCHEDULER


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_every_scheduler_walks_any_number_of_steps(name, steps):
    config = SCHEDULER if name in schedulers_for(SCHEDULER) else FLOW_SCHEDULER
    scheduler = scheduler_named(name, config)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def denoise(sample, timestep):
        seen.append(timestep.tolist())
        return sample * 0.1

    walked = list(trajectory(denoise, scheduler, noise, steps=steps, generator=torch.Generator().manual_seed(1)))
    assert len(walked) == len(seen) >= steps
    assert all(len(set(timesteps)) == 1 and 0 <= timesteps[0] <= (999 if config is SCHEDULER else 1000) for timesteps in seen)
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


def test_a_trajectory_of_a_flow_is_that_of_diffusers_own_loop():
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))  # packed latents
    ours = last_sample(trajectory(lambda x, t: x.tanh(), scheduler_named("flow-euler", FLOW_SCHEDULER), noise, steps=5))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    theirs = noise
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(theirs.tanh(), timestep, theirs).prev_sample
    assert torch.equal(ours, theirs)


def test_a_shift_by_the_size_of_the_image_is_that_of_the_largest():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15)
    set_steps(scheduler, 3)
    expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected.set_timesteps(3, mu=1.15)
    assert torch.equal(scheduler.timesteps, expected.timesteps)
    assert is_flow(scheduler) and not is_flow(scheduler_named("ddim", SCHEDULER))

import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy.pipelines.sampling import is_flow, last_sample, set_steps, trajectory
from edm_deploy.pipelines.schedulers import SCHEDULERS, scheduler_named, schedulers_for
from tests.conftest import FLOW_SCHEDULER, SCHEDULER


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_every_scheduler_samples_in_any_number_of_steps(name, steps):
    config = SCHEDULER if name in schedulers_for(SCHEDULER) else FLOW_SCHEDULER
    scheduler = scheduler_named(name, config)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = []

    def denoise(sample, timestep):
        timesteps.append(timestep.tolist())
        return sample * 0.1

    sampled = list(trajectory(denoise, scheduler, noise, steps=steps, generator=torch.Generator().manual_seed(1)))
    assert len(sampled) == len(timesteps) >= steps
    assert all(len(set(batch)) == 1 and 0 <= batch[0] <= (999 if config is SCHEDULER else 1000) for batch in timesteps)
    assert sampled[-1].next_sample.isfinite().all()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++", "unipc"])
def test_more_steps_than_the_training_schedule_has_are_refused(name):
    with pytest.raises(InputError, match=r"Scheduler cannot sample in 2000 steps: .*Choose"):
        set_steps(scheduler_named(name, SCHEDULER), 2000)


def test_more_steps_than_integers_are_taken_where_timesteps_are_fractional():
    scheduler = scheduler_named("euler", SCHEDULER)
    set_steps(scheduler, 2000)
    assert len(scheduler.timesteps) == 2000


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_steps_are_refused(name):
    config = SCHEDULER if name in schedulers_for(SCHEDULER) else FLOW_SCHEDULER
    with pytest.raises(InputError, match="0 inference steps: expected 1 or more"):
        set_steps(scheduler_named(name, config), 0)


def test_runge_kutta_steps_of_pndm_need_more_than_three():
    from diffusers import PNDMScheduler

    with pytest.raises(InputError, match="PNDMScheduler cannot sample in 3 steps: operands could not be broadcast"):
        set_steps(PNDMScheduler(), 3)


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

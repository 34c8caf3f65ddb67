import copy
import inspect

import pytest

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.schedulers import (
    SCHEDULERS,
    is_flow_config,
    refuse_no_steps,
    scheduler_from_config,
    scheduler_named,
    schedulers_for,
)
from tests.conftest import FLOW_SCHEDULER, SCHEDULER


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_short_name_is_a_class_of_diffusers_on_the_model_s_schedule(name):
    config = SCHEDULER if name in schedulers_for(SCHEDULER) else FLOW_SCHEDULER
    scheduler = scheduler_named(name, config | {"num_train_timesteps": 500})
    assert type(scheduler).__name__ == SCHEDULERS[name]
    assert scheduler.config.num_train_timesteps == 500


def test_flows_and_diffusions_have_different_schedulers():
    assert is_flow_config(FLOW_SCHEDULER) and not is_flow_config(SCHEDULER)
    assert schedulers_for(FLOW_SCHEDULER) == ["flow-euler", "flow-heun"]
    assert sorted(schedulers_for(SCHEDULER) + schedulers_for(FLOW_SCHEDULER)) == sorted(SCHEDULERS)


@pytest.mark.parametrize(
    ("name", "config", "process"), [("euler", FLOW_SCHEDULER, "by flow matching"), ("flow-euler", SCHEDULER, "as a diffusion")]
)
def test_a_scheduler_of_the_other_process_is_refused(name, config, process):
    with pytest.raises(UnsupportedError, match=f"Scheduler '{name}' cannot sample this model, which was trained {process}"):
        scheduler_named(name, config)


def test_a_class_that_diffusers_lacks_is_refused():
    with pytest.raises(UnsupportedError, match=r"has no scheduler 'NoSuchScheduler'\. Install the diffusers version"):
        scheduler_from_config("NoSuchScheduler", SCHEDULER)


def test_an_unknown_scheduler_gets_the_nearest():
    with pytest.raises(UnsupportedError, match="Did you mean 'euler'"):
        scheduler_named("eular", SCHEDULER)


def test_another_scheduler_clips_latents_only_where_the_model_s_scheduler_does():
    own = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    assert scheduler_named("ddim", own | {"_class_name": "PNDMScheduler"}).config.clip_sample is False
    assert scheduler_named("ddpm", own).config.clip_sample is False
    assert scheduler_named("ddim", own | {"_class_name": "DDPMScheduler"}).config.clip_sample is True
    assert scheduler_named("ddim", own | {"_class_name": "PNDMScheduler", "clip_sample": True}).config.clip_sample is True


def test_a_copy_of_a_scheduler_that_refuses_no_steps_sets_its_own():
    scheduler = scheduler_named("euler", SCHEDULER)
    signature = inspect.signature(scheduler.set_timesteps)
    refuse_no_steps(scheduler)
    assert inspect.signature(scheduler.set_timesteps) == signature, "pipelines read which arguments it takes"
    copied = copy.deepcopy(scheduler)
    scheduler.set_timesteps(3)
    copied.set_timesteps(num_inference_steps=5)
    assert (len(scheduler.timesteps), len(copied.timesteps)) == (3, 5)
    for each in (scheduler, copied):
        with pytest.raises(InputError, match="0 inference steps: expected 1 or more"):
            each.set_timesteps(0)

import random

import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy.pipelines.sampling import trajectory
from edm_deploy.pipelines.schedulers import SCHEDULERS, scheduler_named, schedulers_for
from edm_deploy.serving.interface import ImageRequest
from edm_deploy.serving.sample import Sample, Schedule, advance
from tests.conftest import FLOW_SCHEDULER, SCHEDULER

NAMES = schedulers_for(SCHEDULER)


def denoise(sample, timestep):
    """A prediction that depends on sample and timestep; a stand-in where the scheduler alone is tested."""
    return torch.sin(sample * 3) + timestep.reshape(-1, 1, 1, 1) / 1000


def scheduler(name):
    return scheduler_named(name, FLOW_SCHEDULER if name.startswith("flow") else SCHEDULER)


def finished(sample):
    while not sample.done:
        (row,) = sample.inputs()
        advance([sample], [denoise(row["sample"], row["timestep"])])
    return sample.latents


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sample_is_that_of_the_sampling_loop(name, steps):
    """For every scheduler: history of multistep ones, fractional timesteps, input scaling, random numbers."""
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    *_, last = trajectory(denoise, scheduler(name), noise, steps=steps, generator=torch.Generator().manual_seed(2))
    schedule = Schedule(scheduler(name), steps)
    sample = Sample(schedule, noise * schedule.init_sigma, torch.Generator().manual_seed(2), [{}])
    assert torch.equal(finished(sample), last.next_sample)
    assert len(schedule) == sample.position


def test_samples_of_one_schedule_do_not_share_its_state():
    """Two samples of a multistep scheduler whose steps alternate are those that run one after the other."""
    for name in NAMES:
        schedule = Schedule(scheduler(name), 5)
        noises = [torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * schedule.init_sigma for seed in (0, 1)]

        def started(seed, schedule=schedule, noises=noises):
            return Sample(schedule, noises[seed], torch.Generator().manual_seed(seed), [{}])

        alone = [finished(started(seed)) for seed in (0, 1)]
        both = [started(0), started(1)]
        order = random.Random(0).sample([0] * 5 + [1] * 5, 10)
        for which in order:
            (row,) = both[which].inputs()
            advance([both[which]], [denoise(row["sample"], row["timestep"])])
        assert [torch.equal(sample.latents, expected) for sample, expected in zip(both, alone, strict=True)] == [True, True], name


def test_guidance_combines_two_rows():
    schedule = Schedule(scheduler("ddim"), 2)
    latents = torch.randn(1, 3, 4, 4)
    guided, plain = (Sample(schedule, latents, torch.Generator(), [{}] * rows, 3.0) for rows in (2, 1))
    assert len(guided.inputs()) == 2
    unconditional, conditional = torch.randn(2, 1, 3, 4, 4)
    advance([guided], [torch.cat([unconditional, conditional])])
    advance([plain], [unconditional + 3.0 * (conditional - unconditional)])
    assert torch.equal(guided.latents, plain.latents)


@pytest.mark.parametrize("name", [*NAMES, "flow-euler"])
def test_a_start_picture_enters_the_schedule_where_its_strength_says(name):
    whole, part = Schedule(scheduler(name), 10), Schedule(scheduler(name), 10, strength=0.35)
    assert part.values == whole.values[7:]
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    start = part.noised(clean, noise)
    if name.startswith("flow"):
        sigma = part.values[0] / 1000
        assert torch.allclose(start, (1 - sigma) * clean + sigma * noise, atol=1e-5)
    else:
        assert float((start - clean).norm()) > 0 and torch.isfinite(start).all()
    finished(Sample(part, start, torch.Generator().manual_seed(0), [{}]))


def test_the_estimate_is_the_clean_sample_of_a_perfect_prediction():
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    for name in ("ddim", "euler", "flow-euler"):
        made = scheduler(name)
        schedule = Schedule(made, 5)
        sample = Sample(schedule, schedule.noised(clean, noise), torch.Generator(), [{}])
        assert sample.estimate() is sample.latents
        advance([sample], [noise - clean if name.startswith("flow") else noise])
        assert torch.allclose(sample.estimate(), clean, atol=2e-3), name


def test_a_number_of_steps_that_the_scheduler_lacks_is_refused(model):
    with pytest.raises(InputError, match="cannot sample in 1001 steps"):
        model.schedule(ImageRequest(id="a", steps=1001))

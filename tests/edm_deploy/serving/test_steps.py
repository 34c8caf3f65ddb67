import itertools

import pytest
import torch

from edm_deploy.pipelines.sampling import set_steps, trajectory
from edm_deploy.pipelines.schedulers import scheduler_from_config, scheduler_named
from edm_deploy.serving.sample import Sample, Schedule, advance
from edm_deploy.serving.steps import table_of
from tests.conftest import FLOW_SCHEDULER, SCHEDULER
from tests.edm_deploy.serving.test_sample import denoise

TABLED = ("ddim", "euler", "dpm-solver++", "flow-euler")


def scheduler(name, **changes):
    return scheduler_named(name, (FLOW_SCHEDULER if name.startswith("flow") else SCHEDULER) | changes)


def test_the_common_schedulers_have_a_table_and_others_their_own_steps():
    for name in (*TABLED, "ddpm", "unipc", "flow-heun"):
        made = scheduler(name)
        set_steps(made, 3)
        assert (table_of(made, 0) is not None) == (name in TABLED), name


@pytest.mark.parametrize("changes", [{"prediction_type": "v_prediction"}, {"thresholding": True}], ids=["v", "thresholding"])
@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_what_changes_the_formula_has_no_table(name, changes):
    made = scheduler(name, **changes)
    set_steps(made, 3)
    assert table_of(made, 0) is None


VARIANTS = [
    ("ddim", {"clip_sample": True, "clip_sample_range": 0.7}),
    ("ddim", {"set_alpha_to_one": False, "steps_offset": 1}),
    ("ddim", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": False}),
    ("euler", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    ("dpm-solver++", {"use_karras_sigmas": True}),
    ("dpm-solver++", {"solver_order": 1}),
    ("dpm-solver++", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("dpm-solver++", {"euler_at_final": True}),
    ("flow-euler", {"shift": 1.0}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: str(value))
def test_a_configured_scheduler_has_the_steps_that_diffusers_takes(name, changes):
    """In every bit; at 17 steps multistep solvers keep their order to the end."""
    noise = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for steps in (4, 17):
        made = scheduler_from_config(type(scheduler(name)).__name__, {**scheduler(name).config, **changes})
        *_, last = trajectory(denoise, made, noise, steps=steps)
        schedule = Schedule(made, steps)
        assert schedule.table is not None
        sample = Sample(schedule, noise * schedule.init_sigma, torch.Generator(), [{}])
        while not sample.done:
            (row,) = sample.inputs()
            advance([sample], [denoise(row["sample"], row["timestep"])])
        assert torch.equal(sample.latents, last.next_sample)


@pytest.mark.parametrize("name", TABLED)
def test_steps_that_are_taken_together_are_those_taken_alone(name):
    """In every bit, at other positions of other schedules, and for sizes that fill no vector register."""
    for channels, side in ((3, 5), (1, 1), (4, 9)):
        samples = {}
        for alone, seed in itertools.product((True, False), range(5)):
            noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
            schedule = Schedule(scheduler(name), 4 + seed)
            samples[alone, seed] = Sample(schedule, noise * schedule.init_sigma, torch.Generator(), [{}])
        for step in range(8):
            together = [samples[False, seed] for seed in range(5) if not samples[False, seed].done and (seed + step) % 3]
            if together:
                advance(together, [denoise(sample.inputs()[0]["sample"], sample.inputs()[0]["timestep"]) for sample in together])
        for seed in range(5):
            one, other = samples[True, seed], samples[False, seed]
            while one.position < other.position:
                advance([one], [denoise(one.inputs()[0]["sample"], one.inputs()[0]["timestep"])])
            assert torch.equal(one.latents, other.latents), (channels, side, seed)

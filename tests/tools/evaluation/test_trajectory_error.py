from __future__ import annotations

import math

import pytest
import torch

from calibration.data.prompts import PROMPTS as CALIBRATION_PROMPTS
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.pipelines.guidance import Conditioning
from edm_deploy.pipelines.prompt_file import read_prompts
from edm_deploy.pipelines.schedulers import scheduler_from_config
from edm_deploy.pipelines.source import Source, load_source
from edm_deploy_tools.evaluation.denoisers import denoise_of_artifact, denoise_of_source
from edm_deploy_tools.evaluation.trajectory_error import (
    PROMPTS,
    EvaluationSettings,
    psnr_interval,
    reference_trajectory,
    relative_error,
    trajectory_error,
)
from tests.conftest import FLOW_SCHEDULER, SCHEDULER, TINY, tiny_model


@pytest.fixture(scope="module")
def reference(chain):
    return reference_trajectory(load_source(chain.model), EvaluationSettings(samples=3, steps=4, seeds=(1,)))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(InputError, match=f"seed is {seed}; expected an integer from 0 to 9223372036854775807"):
        EvaluationSettings(seeds=(seed,))


def test_relative_error_is_squared_and_relative():
    assert relative_error(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0])) == pytest.approx(0.25)


def test_the_float_model_has_no_error_against_itself(reference):
    error = trajectory_error(denoise_of_source(reference.source, Conditioning()), reference)
    assert error.noise_errors == (0.0, 0.0, 0.0, 0.0)
    assert error.psnr > 120


def test_an_artifact_has_a_small_error(chain, reference):
    error = trajectory_error(denoise_of_artifact(Artifact.load(chain.artifact), Conditioning()), reference)
    assert len(error.noise_errors) == 4
    assert 0 < error.noise_error < 0.5
    assert math.isfinite(error.psnr)


def test_each_seed_has_its_own_samples_and_psnr(chain, reference):
    settings = EvaluationSettings(samples=3, steps=4, seeds=(1, 5))
    both = reference_trajectory(reference.source, settings)
    assert torch.equal(both.noise[:3], reference.noise)
    assert not torch.equal(both.noise[3:], reference.noise)
    error = trajectory_error(denoise_of_artifact(Artifact.load(chain.artifact), Conditioning()), both)
    assert len(error.psnrs) == 2
    low, high = error.psnr_interval
    assert low < error.psnr < high
    assert error.psnr == pytest.approx(sum(error.psnrs) / 2)
    again = reference.decoder.psnr(error.images[3:], both.images[3:])
    assert error.psnrs[1] == pytest.approx(again)


def test_seeds_are_different():
    for seeds in ((), (1, 1)):
        with pytest.raises(InputError, match="expected one or more different seeds"):
            EvaluationSettings(seeds=seeds)


def test_the_weighted_error_is_that_of_each_step_times_its_effect(chain, reference):
    error = trajectory_error(denoise_of_artifact(Artifact.load(chain.artifact), Conditioning()), reference)
    for weighted, relative, weight, step in zip(
        error.weighted_errors, error.noise_errors, reference.step_weights, reference.steps, strict=True
    ):
        assert weighted == pytest.approx(relative * float(weight) * float(step.prediction.square().mean()), rel=1e-4)
    assert error.weighted_error == pytest.approx(sum(error.weighted_errors))


def test_the_same_seed_gives_the_same_trajectory(reference):
    again = reference_trajectory(reference.source, reference.settings)
    assert torch.equal(again.final, reference.final)


def tiny(kind):
    family, config, model = tiny_model(kind)
    scheduler = FLOW_SCHEDULER if family.flow else SCHEDULER
    return Source(
        name=kind,
        family=TINY[kind][0],
        config=config,
        model=model,
        scheduler=scheduler_from_config(scheduler["_class_name"], scheduler),
        pipeline={},
    )


@pytest.mark.parametrize("kind", ["unet2d-condition", "dit", "pixart", "sd3"])
def test_a_guided_trajectory_combines_both_predictions(kind):
    source = tiny(kind)
    family = source.family_object
    trajectory = reference_trajectory(source, EvaluationSettings(samples=2, steps=2, guidance=3.0))
    first, conditioning = trajectory.steps[0], trajectory.conditioning

    def half(changed):
        inputs = {"sample": first.sample, "timestep": torch.full((2,), first.timestep)} | dict(conditioning.conditional) | changed
        return family.prediction(source.config, family.forward(source.model, inputs))

    conditional, unconditional = (
        half({}),
        half({name: value.expand_as(conditioning.conditional[name]) for name, value in conditioning.unconditional.items()}),
    )
    # Batches of 2 and of 4 are summed in different orders, and the difference of the halves is taken three times.
    torch.testing.assert_close(first.prediction, unconditional + 3 * (conditional - unconditional), atol=1e-4, rtol=1e-4)
    assert trajectory.guidance == 3.0
    assert trajectory_error(denoise_of_source(source, conditioning), trajectory).noise_error == 0


def test_an_embedded_guidance_is_an_input():
    trajectory = reference_trajectory(tiny("flux"), EvaluationSettings(samples=2, steps=2, guidance=2.0))
    assert trajectory.conditioning.conditional["guidance"].tolist() == [2.0, 2.0]
    assert (trajectory.guidance, trajectory.scheduler) == (2.0, "flow-euler")
    assert trajectory.images.shape == (2, 4, 8, 8), "packed latents are unpacked"
    assert trajectory.decoder.kind == "latents"


def test_guidance_of_1_runs_the_model_once_per_step():
    trajectory = reference_trajectory(tiny("dit"), EvaluationSettings(samples=2, steps=1, guidance=1.0))
    assert len(trajectory.conditioning.inputs(trajectory.noise, torch.zeros(2))["sample"]) == 2
    assert trajectory.guidance is None


def test_prompts_and_guidance_are_refused_by_a_model_that_takes_none(chain):
    source = load_source(chain.model)
    with pytest.raises(InputError, match=r"--prompts: .* is a unet2d model without text encoders"):
        reference_trajectory(source, EvaluationSettings(prompts=("a cat",)))
    with pytest.raises(InputError, match=r"guidance is 3\.0, but UNet2DModel is not guided"):
        reference_trajectory(source, EvaluationSettings(guidance=3.0))


def test_calibration_and_evaluation_prompts_are_disjoint():
    assert not set(read_prompts(PROMPTS)) & set(CALIBRATION_PROMPTS)
    assert len(read_prompts(PROMPTS)) == EvaluationSettings().samples


def test_the_interval_of_the_psnr_holds_the_mean_of_95_percent_of_repetitions():
    generator = torch.Generator().manual_seed(3)

    def errors(images):
        return 0.01 * torch.empty(3, images, dtype=torch.float64).exponential_(generator=generator)

    truth = 20.0  # dB of an error of 0.01
    inside = sum(low < truth < high for low, high in (psnr_interval(errors(60)) for _ in range(200)))
    assert 170 <= inside <= 200
    assert psnr_interval(torch.full((2, 1), 0.01, dtype=torch.float64)) == pytest.approx((20.0, 20.0))

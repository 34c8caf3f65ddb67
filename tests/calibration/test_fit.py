"""What `fit` reports while it runs; what holds for every recipe is in tests/contracts/test_recipes.py."""

import pytest

from calibration import RunOptions, check_parts, fit
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.minmax import MinMax
from edm_deploy.errors import ArtifactError, InputError
from tests.calibration.tiny import tiny_source


def test_progress_reports_steps_loss_rate_and_memory():
    seen = []
    recipe = EfficientDM(rows=3, calibration_samples=3, steps=2, batch=3, rank=2)
    fit(tiny_source(), recipe, RunOptions(), on_progress=seen.append)
    assert [(p.stage, p.step, p.total) for p in seen] == [("calibrate", n, 3) for n in (1, 2, 3)] + [("finetune", n, 2) for n in (1, 2)]
    assert seen[0].loss is None
    assert seen[-1].loss > 0
    assert seen[-1].eta_seconds == 0
    assert seen[-1].rate > 0
    assert seen[-1].memory_bytes > 1e6


@pytest.mark.parametrize("requested", ["bf16", "fp32"])
def test_the_provenance_of_a_calibration_names_the_dtype_that_it_computes_in(requested):
    artifact = fit(tiny_source(), MinMax(rows=1, calibration_samples=1), RunOptions(teacher_dtype=requested))
    assert artifact.provenance["teacher_dtype"] == "fp32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_as_the_model_s_before_any_work(value):
    source, seen = tiny_source(), []
    source.model.mid_block.attentions[0].to_q.weight[0, 0] = value
    message = r"unet2d: weight 'mid_block\.attentions\.0\.to_q\.weight' holds NaN or infinity, expected finite numbers\. .* again"
    with pytest.raises(ArtifactError, match=message):
        fit(source, MinMax(rows=1, calibration_samples=1), RunOptions(), on_progress=seen.append)
    assert not seen


def test_kernels_that_cannot_run_are_refused_before_anything_is_observed():
    with pytest.raises(InputError, match="--kernels cpp: the kernels in C\\+\\+ are for a CPU"):
        check_parts(EfficientDM(), RunOptions(kernels="cpp", device="cuda"))

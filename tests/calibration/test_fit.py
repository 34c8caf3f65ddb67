"""What `fit` reports while it runs; what holds for every recipe is in tests/contracts/test_recipes.py."""

import pytest

from calibration import RunOptions, fit
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.minmax import MinMax
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

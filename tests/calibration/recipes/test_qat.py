from dataclasses import replace

import pytest
import torch

from calibration import Interrupted, RunOptions, fit
from calibration.recipes.mse import Mse
from calibration.recipes.qat import QAT
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_source
from tests.calibration.training.test_distillation import interrupted_at, late_losses

SETTINGS = {"rows": 4, "steps": 4, "batch": 4, "calibration_samples": 4, "weight_rate": 0.2}


def test_weights_and_biases_are_trained_and_the_source_is_not_changed():
    source = tiny_source()
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    trained = fit(source, QAT(**SETTINGS), RunOptions(teacher_dtype="fp32"))
    start = fit(source, Mse(rows=4, calibration_samples=4, eta=1.0, weight_bits=4, act_bits=4, bias_correction=False), RunOptions())
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    for name, site in trained.sites.items():
        assert not torch.equal(site.codes, start.sites[name].codes) or not torch.equal(
            trained.params[f"{name}.bias"], start.params[f"{name}.bias"]
        )


def test_an_interrupted_and_resumed_run_ends_in_the_same_artifact(tmp_path):
    source, recipe = tiny_source(), QAT(**SETTINGS)
    whole = fit(source, recipe, RunOptions())
    with pytest.raises(Interrupted, match="after step 2"):
        fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupted_at(2))
    assert fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True)).digest == whole.digest


def test_training_lowers_the_distance_to_the_teacher():
    settings = {"rows": 2, "steps": 24, "batch": 16, "calibration_samples": 16, "weight_rate": 0.05}
    recipe = QAT(**settings, weight_bits=2, act_bits=8, compute="fp32")
    untrained = replace(recipe, weight_rate=1e-30, weight_scale_rate=0.0, scale_rate=0.0, bound_rate=0.0)
    # On the same samples. The ratio is 0.68 here, exactly 1 without a gradient, and 19 with its sign reversed.
    assert late_losses(recipe) < 0.9 * late_losses(untrained)


@pytest.mark.parametrize(
    ("settings", "message"), [({"weight_rate": -1.0}, "weight_rate"), ({"steps": 0}, "steps"), ({"compute": "fp8"}, "fp8")]
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        QAT(**settings)

import signal

import pytest
import torch

from calibration import RunOptions, fit
from calibration.recipes.efficientdm import RECIPE
from calibration.recipes.mse import Mse
from calibration.run.options import Interrupted
from edm_deploy.errors import InputError
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from tests.calibration.tiny import tiny_context, tiny_source


@pytest.fixture(scope="module")
def student():
    source = tiny_source()
    recipe = RECIPE(rows=3, rank=4)
    student = recipe.student(source, calibrated_timesteps(source.scheduler, 3), torch.device("cpu"))
    for layer in student.layers.values():
        layer.add_update(recipe.rank, torch.Generator().manual_seed(0))
        layer.set_weight_scale(torch.full_like(layer.log_weight_scale, 0.02))
    return student


def test_the_rate_of_an_update_follows_the_weight_scale_of_its_layer(student):
    rates = [group.rate for group in RECIPE(update_rate=1 / 2500).groups(student)[: len(student.layers)]]
    assert rates == pytest.approx([0.02 / 2500] * len(student.layers))


def test_an_update_is_zero_initially(student):
    for layer in student.layers.values():
        assert torch.equal(layer.merged_weight(), layer.layer.weight)


def test_bounds_are_learned_only_where_they_are_not_fixed(student):
    learned = {id(parameter) for parameter in RECIPE(rows=3).groups(student)[-1].parameters}
    for quantizer in student.quantizers.values():
        assert (id(quantizer.qmin) in learned) == (quantizer.bits < 8)


def test_the_published_constants_are_the_defaults():
    recipe = RECIPE()
    assert (recipe.weight_bits, recipe.act_bits, recipe.rank, recipe.steps, recipe.rows) == (4, 4, 32, 16000, 100)
    assert (recipe.update_rate, recipe.bound_rate, recipe.eta) == (1 / 2500, 5e-4, 1.0)


@pytest.mark.parametrize(
    "setting", [{"steps": 0}, {"batch": 0}, {"rank": 0}, {"update_rate": -1.0}, {"compute": "fp8"}, {"eta": 2.0}], ids=str
)
def test_a_setting_outside_its_range_is_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        RECIPE(**setting)


def test_a_rank_above_that_of_every_layer_is_refused_before_the_calibration():
    recipe = RECIPE(rows=3, rank=33)  # 32, the default, is accepted on every model
    with pytest.raises(InputError, match=r"rank is 33; the largest that a layer of this model can use is 32\. Set rank to 32 or less"):
        recipe.fit(tiny_context(recipe))


def test_an_update_that_is_kept_is_a_branch_next_to_the_codes_of_calibration(tmp_path):
    common = {"rows": 3, "calibration_samples": 2, "eta": 1.0, "bias_correction": False, "weight_bits": 4, "act_bits": 4}
    recipe = RECIPE(**common, rank=4, steps=2, batch=2, keep_branch=True, weight_scale_rate=0.0)
    kept, plain = fit(tiny_source(), recipe, RunOptions()), fit(tiny_source(), Mse(**common), RunOptions())
    branches = kept.structure.branches
    assert set(branches.values()) == {4} and not any(kept.family_object.placement(name) == "w8a8" for name in branches)
    for name in branches:
        assert torch.equal(kept.sites[f"{name}.base"].codes, plain.sites[name].codes)
    assert any(float(kept.params[f"{name}.branch.up.weight"].abs().sum()) > 0 for name in branches), "they were trained"

    def interrupt(progress):
        if progress.stage == "finetune" and progress.step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupt)
    resumed = fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True))
    assert resumed.digest == kept.digest

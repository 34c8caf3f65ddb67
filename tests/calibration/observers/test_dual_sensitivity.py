from dataclasses import replace

import pytest
import torch

from calibration.base_pass import PassContext
from calibration.observers.calibrate import calibrate
from calibration.observers.dual_sensitivity import DualSensitivity, LayerConstraints, dual_sensitivities
from calibration.observers.sensitivity import groups_to_raise
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.qat import QAT
from calibration.student.student import activations_unquantized
from calibration.training import divergence
from edm_deploy.pipelines.guidance import Conditioner
from tests.calibration.tiny import CPU, tiny_context, tiny_source

SETTINGS = {"weight_bits": 4, "act_bits": 4, "rows": 2, "steps": 3, "batch": 2, "step_weighting": 0.0, "compute": "fp32"}
RECIPE = EfficientDM(**SETTINGS, rank=2)
SITE = "up_blocks.0.resnets.0.conv1"


def groups_of(recipe, kind="unet2d"):
    source = tiny_source(kind)
    context = PassContext(source=source, recipe=recipe, conditioner=Conditioner(source.family_object, source.config), device=CPU)
    family = source.family_object
    return groups_to_raise(context, {name: recipe.layer_spec(name, family.placement(name)) for name in family.sites(source.model)})


def duals_of(recipe, kind="unet2d", *, coarse=None, on_progress=lambda progress: None):
    """Dual variables by site of a tiny model, one of whose layers may have weight scales that are eight times too large."""
    context = tiny_context(recipe, kind, on_progress=on_progress)
    if coarse is not None:
        context.student.layers[coarse].log_weight_scale.data += 2.0794  # log 8
    found = dual_sensitivities(context, recipe, groups_of(recipe, kind), weights_too=True, row_weights=torch.ones(2))
    assert [each.sites for each in found] == groups_of(recipe, kind)
    return {site: dual for each in found for site, dual in zip(each.sites, each.duals, strict=True)}


@pytest.fixture(scope="module")
def constrained():
    """A calibrated student with constraints on two layers."""
    context = tiny_context(RECIPE)
    calibrate(context, RECIPE)
    return context, LayerConstraints(context, [SITE, "conv_out"], torch.ones(2), seed=1)


@pytest.mark.parametrize("site", [SITE, "up_blocks.1.resnets.0.conv1"])
def test_a_layer_that_is_rounded_coarsely_has_the_largest_dual_variable(site, monkeypatch):
    warnings = []
    monkeypatch.setattr(divergence.log, "warning", lambda *words: warnings.append(words))
    duals = duals_of(RECIPE, coarse=site)
    assert max(duals, key=duals.__getitem__) == site
    assert warnings == []  # although the Lagrangian rises with it


def test_of_the_last_layer_the_effect_is_the_square_of_its_error(constrained):
    _, constraints = constrained
    with constraints.observed():
        effects = torch.stack([constraints.mean_effects(2) for _ in range(100)]).mean(0)
        output, rounding = constraints._outputs["conv_out"]
    assert output.shape == rounding.shape
    # 200 squares of a normal number: their mean has a relative standard deviation of (2 / 200)^0.5 = 0.1.
    assert float(effects[1]) == pytest.approx(float(rounding.detach().square().flatten(1).sum(1).mean()), rel=0.4)


def test_the_effect_of_an_inner_layer_is_the_change_of_the_prediction_that_its_rounding_makes(constrained):
    context, constraints = constrained
    inputs = context.trajectories._batch(torch.arange(2)).inputs
    with activations_unquantized(context.student):  # so that the prediction is a smooth function of the layer's output
        with constraints.observed(), torch.no_grad():
            rounded = context.student(inputs)
            rounding = 0.01 * constraints._outputs[SITE][1]
        handle = context.student.layers[SITE].register_forward_hook(lambda module, args, output: output - rounding)
        with torch.no_grad():
            change = 100 * (context.student(inputs) - rounded)
        handle.remove()
        with constraints.observed():
            effects = torch.stack([constraints.mean_effects(2) for _ in range(100)]).mean(0)
    # 200 squares of a normal number: their mean has a relative standard deviation of (2 / 200)^0.5 = 0.1.
    assert float(effects[0]) == pytest.approx(float(change.square().flatten(1).sum(1).mean()), rel=0.4)


def test_rows_of_weight_0_do_not_count(constrained):
    context, _ = constrained
    constraints = LayerConstraints(context, [SITE], torch.zeros(2), seed=1)
    with constraints.observed():
        assert constraints.mean_effects(1).tolist() == [0.0]


def test_neither_the_pool_nor_the_student_is_changed_by_the_measurement(constrained):
    context, constraints = constrained
    state = {name: value.clone() for name, value in context.trajectories.state().items()}
    with constraints.observed():
        constraints.mean_effects(1)
    assert all(torch.equal(value, context.trajectories.state()[name]) for name, value in state.items())
    assert not any(layer._forward_hooks for layer in context.student.layers.values()) and not context.student._forward_hooks


def test_the_loss_trains_the_layer_and_not_the_way_from_it_to_the_prediction(constrained):
    context, constraints = constrained
    constraints.duals = torch.tensor([1.0, 0.0])
    with constraints.observed():
        context.student(context.trajectories.next_batch(2).inputs)
        constraints({}, {}).backward()
    own, later = (context.student.layers[name].log_weight_scale.grad for name in (SITE, "conv_out"))
    assert float(own.abs().sum()) > 0
    assert later is None or float(later.abs().sum()) == 0
    constraints.duals = torch.zeros(2)


def test_a_dual_variable_rises_with_its_slack_and_stays_0_where_the_constraint_holds(constrained):
    _, constraints = constrained
    for slacks, duals in (([0.5, -0.5], [0.5, 0.0]), ([0.5, 0.25], [1.0, 0.25]), ([-0.25, -9.0], [0.75, 0.0])):
        constraints.slacks = torch.tensor(slacks)
        constraints.ascend(0.1)
        assert constraints.duals.tolist() == pytest.approx([0.1 * dual for dual in duals])


def test_a_constraint_that_holds_throughout_leaves_its_dual_variable_at_0(monkeypatch):
    mean_effects = LayerConstraints.mean_effects
    monkeypatch.setattr(LayerConstraints, "mean_effects", lambda self, batch: mean_effects(self, batch) + 100.0)  # so loose are all bounds
    assert set(duals_of(RECIPE).values()) == {0.0}


@pytest.mark.parametrize(("recipe", "kind"), [(RECIPE, "dit"), pytest.param(QAT(**SETTINGS), "unet2d", marks=pytest.mark.extended)])
def test_equal_seeds_give_equal_dual_variables(recipe, kind):
    duals = duals_of(recipe, kind)
    assert duals == duals_of(recipe, kind)
    assert duals != duals_of(replace(recipe, seed=1), kind)
    assert min(duals.values()) >= 0 and max(duals.values()) > 0


def test_the_gain_of_a_group_is_the_sum_over_its_sites():
    assert DualSensitivity(sites=("a", "b"), duals=(0.25, 0.5)).gain == 0.75


def test_progress_is_that_of_a_measurement():
    seen = []
    duals_of(RECIPE, on_progress=seen.append)
    measured = [progress for progress in seen if progress.stage == "sensitivity"]
    assert [progress.step for progress in measured] == [1, 2, 3]
    assert {progress.stage for progress in seen} == {"calibrate", "sensitivity"}

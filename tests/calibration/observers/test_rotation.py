from dataclasses import dataclass, replace

import pytest
import torch

import calibration
from calibration.observers.channel_scaling import channel_ranges, stacked_weight
from calibration.observers.rotation import Group, measure, rotatable, rotate_inputs
from calibration.recipe import TrainingContext
from calibration.recipes.dilate import dilate
from calibration.recipes.mse import Mse
from calibration.recipes.tcaq import Tcaq
from calibration.run.options import RunOptions
from calibration.student.teacher import Teacher
from calibration.student.to_artifact import artifact_from_student
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import InputError
from edm_deploy.network.restructure import PUBLISHED
from edm_deploy.pipelines.guidance import Conditioner
from tests.calibration.tiny import CPU, tiny_context, tiny_source
from tests.conftest import tiny_inputs

BLOCK = "transformer_blocks.0"
QKV = [f"{BLOCK}.attn1.to_{letter}" for letter in "qkv"]


def rotated(recipe, kind="dit", folded=()):
    """Source, structure and what was done."""
    source = tiny_source(kind)
    return rotate_inputs(source, recipe, PUBLISHED, Conditioner(source.family_object, source.config), CPU, folded)


def with_outlier():
    """A tiny DiT in whose first block one channel of the input of q, k and v is 30 times the others."""
    source = tiny_source("dit")
    bias = source.model.transformer_blocks[0].norm1.linear.bias
    bias.data.view(6, -1)[1, 3] += 29
    return source


def groups_of(source, recipe):
    groups = rotatable(source, recipe, PUBLISHED, ())
    measure(groups, source, recipe, Conditioner(source.family_object, source.config), CPU)
    return {name: group for group in groups for name in group.blocks}


def test_without_the_setting_nothing_is_rotated():
    source, structure, done = rotated(Mse())
    assert (structure, done) == (PUBLISHED, "") and not any(hasattr(layer, "rotated_block") for layer in source.model.modules())


def test_linear_layers_of_attention_and_feed_forward_are_rotated_together_with_their_siblings():
    found = {frozenset(group.blocks) for group in rotatable(tiny_source("dit"), Mse(rotate="all"), PUBLISHED, ())}
    one = {frozenset(QKV), *(frozenset([f"{BLOCK}.{name}"]) for name in ("attn1.to_out.0", "ff.net.0.proj", "ff.net.2"))}
    assert found == one | {frozenset(name.replace("blocks.0", "blocks.1") for name in names) for names in one}
    unet = [name for group in rotatable(tiny_source(), Mse(rotate="all"), PUBLISHED, ()) for name in group.blocks]
    assert len(unet) == 16 and all(".attentions." in name for name in unet), "convolutions and time embeddings are not"


def test_blocks_of_a_head_are_folded_and_the_teacher_s_function_is_the_published_one():
    recipe = Mse(rotate="all", rotate_block=8)
    for kind in ("dit", "sd3"):
        source, structure, done = rotated(recipe, kind)
        assert done.endswith("4 of them folded" if kind == "sd3" else "2 of them folded")
        assert not any("to_out" in name or "to_add_out" in name for name in structure.rotated)
        inputs = tiny_inputs(kind)
        expected = tiny_source(kind)
        expected = expected.family_object.forward(expected.model, inputs)
        torch.testing.assert_close(source.family_object.forward(source.model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_with_an_outlier_channel_is_rotated_and_the_others_only_where_it_helps():
    recipe = Mse(weight_bits=4, act_bits=4, rotate="auto")
    groups = groups_of(with_outlier(), recipe)
    outlier, other = groups[QKV[0]], groups[QKV[0].replace("blocks.0", "blocks.1")]
    assert groups[QKV[1]] is outlier, "q, k and v are decided together"
    assert outlier.errors[1] < 0.6 * outlier.errors[0] and outlier.improves
    assert other.errors[1] > 0.7 * other.errors[0], "there is no outlier"


def test_a_rotation_that_costs_time_has_to_pay_for_it():
    assert not Group({}, errors=[1.0, 0.96]).improves and Group({}, errors=[1.0, 0.96], folded=True).improves
    assert not Group({}, errors=[1.0, 1.0], folded=True).improves


def error_of(source, recipe):
    artifact = calibration.fit(source, recipe, RunOptions())
    inputs = tiny_inputs("dit")
    exact = source.family_object.forward(source.model, inputs)
    return artifact, float((Reference(artifact)(inputs) - exact).square().mean() / exact.square().mean())


def test_auto_rotates_the_outliers_and_the_artifact_s_error_falls():
    recipe = Mse(rows=3, calibration_samples=4, weight_bits=8, act_bits=4)
    _, before = error_of(with_outlier(), recipe)
    artifact, after = error_of(with_outlier(), replace(recipe, rotate="auto"))
    assert set(QKV) <= set(artifact.structure.rotated)
    assert artifact.provenance["rotations"].startswith(f"{len(artifact.structure.rotated)} of 12")
    assert after < 0.8 * before


def test_a_recipe_that_smooths_sees_published_channels():
    """Pre-scales come before the rotation, so that their observers and weights are those of the published layer."""
    recipe = Mse(rows=2, rotate="all", rotate_block=8)
    plain = tiny_context(recipe, "dit")
    source, structure, _ = rotated(recipe)
    teacher = Teacher(source, CPU)
    student = recipe.student(source, plain.student.timesteps, CPU, teacher=teacher, structure=structure)
    context = TrainingContext(student, teacher, tiny_context(recipe, "dit").trajectories, plain.run)
    name = f"{BLOCK}.ff.net.2"
    for found, expected in (
        (channel_ranges(context, [name])[name].amax(), channel_ranges(plain, [name])[name].amax()),
        (stacked_weight(student, name), stacked_weight(plain.student, name)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    artifact = artifact_from_student(student, source, {})
    assert artifact.structure.rotated == structure.rotated and artifact.params.keys() == {
        key for key in tiny_source("dit").model.state_dict() if key.removesuffix(".weight") not in artifact.sites
    }


def test_rotated_layers_are_not_dilated():
    recipe = Mse(rows=2, rotate="all")
    source, structure, _ = rotated(recipe, "unet2d")
    student = recipe.student(source, torch.tensor([0, 500], dtype=torch.int32), CPU, structure=structure)
    dilate(student)
    assert student.structure.pre_scaled and not set(student.structure.pre_scaled) & set(structure.rotated)


@dataclass(frozen=True, kw_only=True)
class Quick(Tcaq):
    steps: int = 4
    samples: int = 4
    batch: int = 2


def test_reconstruction_with_pre_scales_keeps_the_codes_that_it_learned():
    recipe = Quick(rows=2, calibration_samples=4, weight_bits=8, act_bits=8, rotate="all", rotate_block=8)
    artifact, error = error_of(tiny_source("dit"), recipe)
    assert artifact.structure.rotated and error < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotate": "some"}, "rotate is 'some'; expected one of off, all, auto"),
        ({"rotate_block": 24}, "rotate_block is 24; expected a power of two, 2 to 1024, or 0"),
        ({"rotate_block": 2048}, "rotate_block is 2048; expected a power of two, 2 to 1024"),
        ({"rotate_block": -4}, "rotate_block is -4; expected a power of two"),
    ],
)
def test_settings_that_no_layer_can_have_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Mse(**settings)


def test_a_block_that_does_not_divide_names_the_layer_and_one_that_does():
    with pytest.raises(
        InputError, match=r"rotate_block is 64, which does not divide the 16 input channels of 'tr.*to_q'\. Set rotate_block=16"
    ):
        rotated(Mse(rotate="all", rotate_block=64))
    source = tiny_source()
    names = [name for name, layer in source.model.named_modules() if isinstance(layer, torch.nn.Linear)]
    with pytest.raises(InputError, match=r"rotate is 'auto', but unet2d has no linear layer .* Set rotate=off"):
        rotated(Mse(rotate="auto"), "unet2d", names)

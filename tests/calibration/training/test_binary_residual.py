import pytest
import torch
from torch import nn

from calibration import Interrupted, RunOptions, fit
from calibration.recipes.mpq_dm import MPQDM
from calibration.student.layers import StudentLayer
from calibration.student.quantization_spec import LayerSpec
from calibration.training.binary_residual import BinaryResidual, commit, grid_points
from tests.calibration.tiny import tiny_source
from tests.calibration.training.test_distillation import interrupted_at

SETTINGS = {"rows": 3, "calibration_samples": 2, "steps": 4, "batch": 2, "rank": 2, "residual_share": 0.2, "relation_weight": 0.0}


def layer_of(weight, scale, bits=4):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    student = StudentLayer(layer, LayerSpec(weight_bits=bits, act_bits=None, symmetric=True), None)
    student.set_weight_scale(scale)
    return student


@pytest.mark.parametrize(("largest", "points"), [(8, 15), (4, 28), (2, 51), (16, 7), (32, 3), (64, 1), (127, 1)])
def test_the_finest_grid_that_int8_holds(largest, points):
    assert grid_points(largest) == points
    assert points * largest + points // 2 <= 127
    assert (points + 1) * largest + (points + 1) // 2 > 127


def test_the_second_term_is_the_mean_error_with_the_error_s_sign():
    # Nearest codes 1, -2, 0, 3 leave 0.3, -0.3, 0.1, 0.1: alpha 0.2, three fifteenths of the scale.
    layer = layer_of(torch.tensor([[1.3, -2.3, 0.1, 3.1]]), torch.ones(1))
    found = BinaryResidual(layer, torch.ones(1))()
    torch.testing.assert_close(found, torch.tensor([[1.2, -2.2, 0.2, 3.2]]))


def test_channels_that_are_not_salient_are_rounded_to_nearest():
    torch.manual_seed(0)
    layer = layer_of(4 * torch.rand(4, 32) - 2, torch.full((4,), 0.3))  # nothing is clipped
    plain = layer.nearest_weight().detach()
    found = BinaryResidual(layer, torch.tensor([0, 1, 0, 0]))().detach()
    assert torch.equal(found[[0, 2, 3]], plain[[0, 2, 3]])
    weight = layer.merged_weight()
    assert float((found - weight)[1].square().sum()) < 0.4 * float((plain - weight)[1].square().sum())


@pytest.mark.parametrize("scaled", [False, True])
def test_committed_codes_are_what_was_trained(scaled):
    torch.manual_seed(0)
    layer = layer_of(torch.randn(6, 32), torch.full((6,), 0.3))
    if scaled:
        layer.set_pre_scale(torch.rand(32) + 0.5)
    layer.set_channel_bits(torch.tensor([3, 4, 5, 4, 4, 4]))
    layer.add_update(2, torch.Generator().manual_seed(0))
    layer.lora_b.data.normal_(0, 0.1)
    layer.rounding = BinaryResidual(layer, torch.tensor([1, 1, 1, 0, 0, 0]))
    expected = layer.rounded_weight().detach()
    assert commit([layer]) == 3
    codes, scale = layer.codes()
    assert layer.channel_bits.tolist() == [8, 8, 8, 4, 4, 4]
    assert int(codes.abs().max()) <= 127
    torch.testing.assert_close(codes.float() * scale[:, None], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.rounded_weight(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_weight_and_scale():
    layer = layer_of(torch.randn(3, 16), torch.full((3,), 0.3))
    layer.layer.weight.requires_grad_(True)
    BinaryResidual(layer, torch.ones(3))().square().sum().backward()
    assert bool(layer.layer.weight.grad.any()) and bool(layer.log_weight_scale.grad.any())


def test_an_artifact_holds_both_terms_in_one_code_and_a_resumed_run_ends_in_the_same(tmp_path):
    source, recipe = tiny_source(), MPQDM(**SETTINGS)
    whole = fit(source, recipe, RunOptions())
    with_residual = [site for site in whole.sites.values() if site.channel_bits is not None and 8 in site.channel_bits.tolist()]
    assert whole.provenance["residual_channels"] == sum(int((site.channel_bits == 8).sum()) for site in with_residual) > 0
    with pytest.raises(Interrupted, match="after step 2"):
        fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupted_at(2))
    assert fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True)).digest == whole.digest

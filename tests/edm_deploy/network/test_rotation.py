import pytest
import torch

from edm_deploy.models import family_named
from edm_deploy.network.float_program import exported_program
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.restructure import NetworkRewrite, restructure
from edm_deploy.network.rotation import DTYPES, gain, hadamard, largest_block, rotate, rotate_weight
from tests.conftest import TINY_DIT, tiny_inputs, tiny_model

QKV = [f"transformer_blocks.0.attn1.to_{letter}" for letter in "qkv"]


def test_the_matrix_of_four_is_the_regular_one():
    assert (2 * hadamard(4)).tolist() == [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]


@pytest.mark.parametrize("block", [2, 4, 8, 32, 256])
def test_a_matrix_is_its_own_inverse_but_for_its_gain_and_narrow_types_hold_it(block):
    matrix = hadamard(block)
    assert torch.equal(matrix, matrix.T) and torch.equal(matrix @ matrix * gain(block), torch.eye(block))
    assert all(torch.equal(hadamard(block, dtype).float(), matrix) for dtype in DTYPES)
    assert matrix.sum(0).max() == 1, "a mean that all channels share gathers in none"


def test_an_outlier_is_spread_over_its_block_and_no_other():
    x = torch.zeros(1, 32)
    x[0, 5] = 8.0
    assert rotate(x, 16).abs().tolist() == [[2.0] * 16 + [0.0] * 16]


@pytest.mark.parametrize(("channels", "block"), [(24, 8), (16, 16), (12, 2)])
def test_the_weight_undoes_the_rotation(channels, block):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, channels), torch.randn(7, channels)
    torch.testing.assert_close(rotate(x, block) @ rotate_weight(weight, block).T, x @ weight.T)
    torch.testing.assert_close(rotate(rotate_weight(weight, block), block), weight)


def test_the_largest_block_divides_the_channels():
    assert [largest_block(channels) for channels in (1152, 72, 3072, 5)] == [128, 8, 256, 1]


def test_siblings_are_rotated_once_and_share_their_input_only_if_they_are_rotated_alike():
    family = family_named("dit-transformer-2d")
    alike, apart = NetworkRewrite(rotated=dict.fromkeys(QKV, 8)), NetworkRewrite(rotated={QKV[1]: 8, QKV[2]: 4})
    program = exported_program(family, tiny_model("dit")[1], torch.float32, structure=alike)
    assert sum(node.target is torch.ops.aten.matmul.default for node in program.graph.nodes) == 1
    shared, separate = (model_work(family, TINY_DIT, structure) for structure in (alike, apart))
    assert [shared.shared_input[name] for name in QKV] == [QKV[0]] * 3
    assert [separate.shared_input[name] for name in QKV] == QKV
    # 16 tokens of 16 channels, blocks of 8.
    assert shared.other_macs - model_work(family, TINY_DIT).other_macs == 16 * 16 * 8


@pytest.mark.parametrize("kind", ["unet2d", "flux"])
def test_a_rotated_model_s_function_is_not_changed(kind):
    family, _, model = tiny_model(kind)
    layers = {name: layer for name, layer in family.sites(model).items() if isinstance(layer, torch.nn.Linear)}
    inputs = tiny_inputs(kind)
    expected = family.forward(model, inputs)
    restructure(model, NetworkRewrite(rotated={name: largest_block(layer.in_features) for name, layer in layers.items()}))
    torch.testing.assert_close(family.forward(model, inputs), expected, rtol=1e-4, atol=1e-5)

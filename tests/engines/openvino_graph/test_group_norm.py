import numpy as np
import pytest
import torch

from engines.openvino_graph.core import core
from engines.openvino_graph.group_norm import split_group_norms

ov = pytest.importorskip("openvino")
ops = ov.opset13


def compiled(model, precision):
    return core(ov).compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})


@pytest.mark.parametrize(
    ("mean", "precision", "tolerance"), [(0.0, "f32", 1e-5), (30.0, "f32", 1e-4), (0.0, "bf16", 0.02), (3.0, "bf16", 0.03)]
)
def test_a_split_group_norm_is_the_group_norm(mean, precision, tolerance):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 5) * torch.linspace(0.5, 2, 8).reshape(8, 1, 1) + mean
    gamma, beta = torch.randn(8), torch.randn(8)
    parameter = ops.parameter([-1, 8, -1, -1], ov.Type.f32)
    norm = ops.group_normalization(parameter, gamma.numpy(), beta.numpy(), 4, 1e-5)
    model = ov.Model([norm], [parameter])
    split_group_norms(ov, model, bf16=precision == "bf16")
    assert "GroupNormalization" not in {node.get_type_name() for node in model.get_ops()}
    found = torch.from_numpy(compiled(model, precision)(x.numpy())[0].copy())
    expected = torch.nn.functional.group_norm(x, 4, gamma, beta, eps=1e-5)
    # A mean of 30 deviations costs float32 five bits; bfloat16 has eight bits in all, of which a mean of three deviations costs less than two.
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def affine_norm(shared):
    """The group norm of 0.25 b (x * weight) + bias + embedding, with b per sample; where `shared`, its input is an output too."""
    torch.manual_seed(1)
    weight, bias = torch.randint(-7, 8, (8, 4, 1, 1), dtype=torch.int8), torch.randn(1, 8, 1, 1)
    x, b, embedding = (ops.parameter(shape, ov.Type.f32) for shape in ([2, 4, 6, 5], [2, 1, 1, 1], [2, 8, 1, 1]))
    scaled = ops.multiply(ops.convert(ops.constant(weight.numpy()), "f32"), ops.constant(np.full((8, 1, 1, 1), 0.25, np.float32)))
    y = ops.multiply(ops.convolution(x, scaled, [1, 1], [0, 0], [0, 0], [1, 1]), b)
    y = ops.add(ops.add(y, ops.constant(bias.numpy())), embedding)
    norm = ops.group_normalization(y, np.ones(8, np.float32), np.zeros(8, np.float32), 4, 1e-5)
    return ov.Model([ops.result(norm), *([ops.result(y)] if shared else [])], [x, b, embedding])


def full_size_nodes(model) -> list[str]:
    """Types of the nodes that compute on feature maps of 8 channels, without constants and results."""
    ordered = [node for node in model.get_ordered_ops() if node.get_type_name() not in ("Constant", "Result", "Parameter")]
    return [node.get_type_name() for node in ordered if list(node.get_output_partial_shape(0).get_max_shape())[1:] == [8, 6, 5]]


@pytest.mark.parametrize("shared", [False, True])
def test_in_bfloat16_what_is_done_to_whole_channels_before_is_not_computed_on_the_feature_map(shared):
    inputs = [torch.randint(-7, 8, (2, 4, 6, 5)).float().numpy(), np.array([0.5, 2], np.float32).reshape(2, 1, 1, 1)]
    inputs.append(torch.randn(2, 8, 1, 1).numpy())
    expected = compiled(affine_norm(shared), "f32")(inputs)[0]
    model = affine_norm(shared)
    split_group_norms(ov, model, bf16=True)
    steps = ["Multiply", "Add", "Add"] if shared else ["Round"]
    assert full_size_nodes(model) == ["Convolution", *steps, "Multiply", "Add"]
    found = compiled(model, "f32")(inputs)[0]
    # The factor alone is rounded to bfloat16: 2^-9 of each value.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-8 * np.abs(expected).max())


def test_in_float32_the_input_of_the_norm_stays_as_it_is():
    model = affine_norm(shared=False)
    split_group_norms(ov, model, bf16=False)
    assert full_size_nodes(model) == ["Convolution", "Multiply", "Add", "Add", "Subtract", "Multiply", "Add"]

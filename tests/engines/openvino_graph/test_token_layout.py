import numpy as np
import pytest
import torch

from engines.openvino_graph.core import core
from engines.openvino_graph.token_layout import transposes_as_views

ov = pytest.importorskip("openvino")
ops = ov.opset13
C, HEADS, D = 8, 2, 4


def constant(*values):
    return ops.constant(np.array(values))


def attention():
    """Group norm of a feature map as [B, C, HW], tokens, products of queries and keys, and the feature map again, as diffusers exports them."""
    x = ops.parameter([-1, C, -1, -1], ov.Type.f32)
    flat = ops.reshape(x, constant(0, C, -1), special_zero=True)
    norm = ops.group_normalization(flat, np.ones(C, np.float32), np.zeros(C, np.float32), 4, 1e-5)
    tokens = ops.transpose(norm, constant(0, 2, 1))
    split = ops.reshape(tokens, constant(0, 0, HEADS, D), special_zero=True)
    queries, values = (ops.transpose(split, constant(0, 2, 1, 3)) for _ in range(2))
    shape = ops.shape_of(queries)
    length = ops.gather(shape, constant(2), constant(0).output(0))
    keys = ops.reshape(queries, ops.concat([constant(-1), length, constant(D)], 0), special_zero=False)
    keys = ops.transpose(keys, constant(0, 2, 1))
    keys = ops.reshape(keys, ops.concat([constant(-1), constant(HEADS), constant(D), length], 0), special_zero=False)
    mixed = ops.matmul(ops.softmax(ops.matmul(queries, keys, False, False), -1), values, False, False)
    joined = ops.reshape(ops.transpose(mixed, constant(0, 2, 1, 3)), constant(0, -1, C), special_zero=True)
    out = ops.reshape(ops.transpose(joined, constant(0, 2, 1)), ops.shape_of(x), special_zero=False)
    return ov.Model([ops.result(ops.add(out, x))], [x])


def orders(model) -> list[list[int]]:
    found = (node.input_value(1).get_node().data.tolist() for node in model.get_ordered_ops() if node.get_type_name() == "Transpose")
    return sorted(found)


def test_feature_maps_become_tokens_and_back_through_channels_last():
    x = torch.randn(2, C, 3, 5, generator=torch.Generator().manual_seed(0)).numpy()
    expected = core(ov).compile_model(attention(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    model = attention()
    assert [0, 2, 1] in orders(model)
    transposes_as_views(ov, model)
    # Queries, values and their mixture; into and out of [B, H, W, C]; keys.
    assert orders(model) == [[0, 2, 1, 3]] * 3 + [[0, 2, 3, 1]] * 2 + [[0, 3, 1, 2]]
    (norm,) = (node for node in model.get_ops() if node.get_type_name() == "GroupNormalization")
    assert len(norm.get_output_partial_shape(0)) == 4
    found = core(ov).compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_other_transposes_stay_as_they_are():
    x = ops.parameter([2, 6, 4], ov.Type.f32)
    model = ov.Model([ops.result(ops.relu(ops.transpose(x, constant(0, 2, 1))))], [x])
    transposes_as_views(ov, model)
    assert orders(model) == [[0, 2, 1]]

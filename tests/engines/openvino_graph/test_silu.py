import numpy as np
import pytest
import torch

from engines.openvino_graph.core import core
from engines.openvino_graph.silu import split_silus

ov = pytest.importorskip("openvino")
ops = ov.opset13


def silu(shape):
    x = ops.parameter(shape, ov.Type.f32)
    return ov.Model([ops.result(ops.multiply(x, ops.sigmoid(x)))], [x])


def types(model) -> set[str]:
    return {node.get_type_name() for node in model.get_ops()}


def test_silu_of_a_feature_map_is_computed_by_exponential_and_division():
    model = silu([1, 2, 5, 1])
    split_silus(ov, model)
    assert {"Exp", "Divide"} <= types(model)
    assert "Sigmoid" not in types(model)
    x = np.array([-200, -20, -3, -1, -1e-3, 0, 1e-3, 1, 20, 200], np.float32).reshape(1, 2, 5, 1)
    compiled = core(ov).compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # OpenVINO's own SiLU is not put back.
    assert "Swish" not in str([node.get_rt_info()["originalLayersNames"].astype(str) for node in compiled.get_runtime_model().get_ops()])
    np.testing.assert_allclose(compiled(x)[0], torch.nn.functional.silu(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-30)


def test_silu_of_vectors_and_products_with_other_gates_stay_as_they_are():
    model = silu([2, 5])
    split_silus(ov, model)
    x, other = (ops.parameter([1, 2, 5, 1], ov.Type.f32) for _ in range(2))
    gated = ov.Model([ops.result(ops.multiply(x, ops.sigmoid(other)))], [x, other])
    split_silus(ov, gated)
    assert {"Sigmoid"} <= types(model) & types(gated)
    assert not {"Exp", "Divide"} & (types(model) | types(gated))

import os
import subprocess
import sys

import numpy as np
import openvino as ov
import pytest

import engines.openvino
from edm_deploy.runtime.load import open_session
from engines import build_engine
from engines.openvino_graph import integer_products
from engines.openvino_graph.core import core
from engines.openvino_graph.integer_products import exact_integer_products, two_products, weights_to_float32
from tests.conftest import tiny_inputs
from tests.engines.reference_check import check_against_reference
from tests.this_cpu import openvino_executes

WITHOUT_VNNI = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def saturating(monkeypatch):
    """As on a CPU without VNNI."""
    monkeypatch.setattr(engines.openvino, "exact_integer_products", lambda ov: False)


def precisions(compiled) -> set[str]:
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return {str(info["runtimePrecision"].astype(str)) for info in nodes if str(info["layerType"].astype(str)) in engines.openvino.PRODUCTS}


def test_both_products_are_computed_in_integers_unless_told_otherwise():
    weight = np.random.default_rng(0).integers(-127, 128, (32, 32, 3, 3)).astype(np.int8)
    model = two_products(ov, weight)
    assert precisions(core(ov).compile_model(model, "CPU")) <= {"i8", "u8"}
    weights_to_float32(ov, model)
    compiled = core(ov).compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert precisions(compiled) == {"f32"}
    x = np.random.default_rng(1).integers(-128, 128, (4, 32)).astype(np.float32)
    _, linear = compiled([np.zeros((1, 32, 4, 4), np.float32), x]).values()
    assert np.array_equal(linear, x @ weight[:, :, 0, 0].T.astype(np.float32))


def test_saturating_products_are_found_in_a_process_without_vnni():
    code = "import openvino; from engines.openvino_graph.integer_products import exact_integer_products as exact; print(exact(openvino))"
    found = subprocess.run([sys.executable, "-c", code], env=WITHOUT_VNNI, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False"


@pytest.mark.parametrize("wrong", [0, 1])
def test_one_wrong_product_of_the_two_is_enough(wrong, monkeypatch):
    exact = [9 * 32 * 127, 32 * 127]
    monkeypatch.setattr(integer_products, "_products", lambda ov, code: tuple(of * (code - (at == wrong)) for at, of in enumerate(exact)))
    assert not exact_integer_products.__wrapped__(ov)
    monkeypatch.setattr(integer_products, "_products", lambda ov, code: tuple(of * code for of in exact))
    assert exact_integer_products.__wrapped__(ov)


def test_without_vnni_an_engine_computes_in_float_and_says_so(onnx_w4a4, artifact_w4a4, tmp_path, saturating):
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="openvino")
    assert {plan.executed for plan in manifest.plan.values()} == {"float"}
    assert manifest.build["warnings"] == [integer_products.IN_FLOAT_REASON]
    check_against_reference(tmp_path / "engine", artifact_w4a4)


@pytest.mark.skipif(openvino_executes() == "float", reason="this CPU has neither VNNI nor AMX")
def test_an_engine_from_a_cpu_with_vnni_opens_on_one_without(onnx_w4a4, artifact_w4a4, tmp_path, monkeypatch):
    build_engine(onnx_w4a4, tmp_path / "engine", backend="openvino")
    monkeypatch.setattr(engines.openvino, "exact_integer_products", lambda ov: False)
    said = []
    monkeypatch.setattr(engines.openvino.log, "warning", lambda text, *values: said.append(text % values))
    _, session = open_session(tmp_path / "engine")
    assert said == [integer_products.IN_FLOAT_REASON]
    session.run(tiny_inputs("unet2d", 2))
    (model,) = session._models.values()
    assert precisions(model.compiled) == {"f32"}
    check_against_reference(tmp_path / "engine", artifact_w4a4)

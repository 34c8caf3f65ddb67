import importlib.util

import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy.session import BuildOptions
from engines import build_engine
from engines.trt import BACKEND

without_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")


@without_tensorrt
def test_without_tensorrt_it_says_what_to_install_and_what_can_be_built_here(onnx_w4a4, tmp_path):
    with pytest.raises(
        UnsupportedError, match=r'pip install "edm-deploy\[trt\]" on a machine with an NVIDIA GPU.* trt-rtx .*, ort, openvino'
    ):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="trt", options=BuildOptions(optimization_level=4, workspace_mib=512))
    assert not list(tmp_path.iterdir())


def test_it_has_a_timing_cache_and_builds_for_this_machines_gpu():
    assert BACKEND.options == {"optimization_level", "timing_cache", "workspace_mib"}
    assert BACKEND.default_gpus == ()


@pytest.mark.gpu
def test_every_quantized_site_lands_in_an_int8_layer(onnx_w4a4, tmp_path):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="trt")
    assert {plan.executed for plan in manifest.plan.values()} == {"int8"}

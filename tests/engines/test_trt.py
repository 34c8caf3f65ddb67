import dataclasses
import importlib.util
import shutil
import sys
import types
from pathlib import Path

import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest
from engines import build_engine
from engines.trt import BACKEND

without_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")


@without_tensorrt
def test_without_tensorrt_it_is_refused_with_what_to_install_and_what_can_be_built(onnx_w4a4, tmp_path):
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


@pytest.fixture
def onnx_with_plugins(onnx_w4a4, tmp_path):
    """A graph whose manifest states that its 4-bit sites are plugin nodes."""
    out = tmp_path / "onnx"
    shutil.copytree(onnx_w4a4, out)
    manifest = Manifest.read(out, kind="onnx")
    sites = {name: dataclasses.replace(site, plugin="u4" if site.scheme == "W4A4" else None) for name, site in manifest.sites.items()}
    return out, dataclasses.replace(manifest, sites=sites).write(out, list(manifest.files))


@pytest.mark.parametrize("backend", ["ort", "openvino", "trt-rtx"])
def test_other_backends_refuse_a_graph_of_plugin_nodes_in_one_line(onnx_with_plugins, tmp_path, backend):
    with pytest.raises(UnsupportedError, match=f"{backend} does not run INT4 plugin nodes.*Export again without --int4 plugin") as refused:
        build_engine(onnx_with_plugins[0], tmp_path / "engine", backend=backend)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("gpu", "warned"), [("sm_86", False), ("sm_90", True)])
def test_plugin_sites_are_int4_in_the_plan_and_the_others_are_audited(onnx_with_plugins, tmp_path, monkeypatch, gpu, warned):
    out, manifest = onnx_with_plugins
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="11.4.0"))
    requests = []

    def built(module, request, scratch):
        requests.append(request)
        Path(request.engine).write_bytes(b"engine")
        rest = [site.node for site in manifest.sites.values() if site.plugin is None]
        layers = [
            {"name": node, "type": "gemm", "inputs": ["Int8", "Int8"], "constants": [], "outputs": ["Float"], "nodes": [node]}
            for node in rest
        ]
        return {"layers": layers, "gpus": [gpu]}

    monkeypatch.setattr("engines.nvidia.tensorrt_backend.run_in_child", built)
    engine = build_engine(out, tmp_path / "engine", backend="trt")
    assert requests[0].plugins
    plugins = manifest.plugin_sites
    assert {name: (plan.executed, plan.codes) for name, plan in engine.plan.items()} == {
        name: ("int4", "u4") if name in plugins else ("int8", None) for name in manifest.sites
    }
    assert warned == any("no INT4 tensor cores" in warning for warning in engine.build["warnings"])

import json
from collections import Counter

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import open_session
from edm_deploy.runtime.manifest import NAME, Manifest, ShapeRange
from engines import build_engine
from engines.nvidia.tensorrt_backend import AUDIT_NAME, ENGINE_NAME

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
RTX_3090 = BuildOptions(gpu="rtx3090")


@pytest.fixture(scope="module")
def engine(onnx_w4a4_fp16, tmp_path_factory):
    path = tmp_path_factory.mktemp("trt_rtx") / "engine"
    build_engine(onnx_w4a4_fp16, path, backend="trt-rtx", options=RTX_3090)
    return path


def test_every_quantized_site_lands_in_an_int8_layer(engine):
    manifest = Manifest.read(engine, kind="engine")
    assert Counter((plan.stored, plan.executed) for plan in manifest.plan.values()).keys() == {("W4A4", "int8"), ("W8A8", "int8")}
    assert manifest.build["sites_in_integer_layers"] == len(manifest.sites)
    audit = json.loads((engine / AUDIT_NAME).read_text())
    assert set(audit) == set(manifest.sites)
    assert all("(Int8, Int8" in kind for finding in audit.values() for kind in finding["types"])


def test_the_manifest_names_gpu_and_version(engine):
    import tensorrt_rtx

    manifest = Manifest.read(engine, kind="engine")
    assert manifest.build["gpus"] == ["sm_86"]
    assert manifest.build["versions"] == {"tensorrt_rtx": tensorrt_rtx.__version__}
    assert {ENGINE_NAME, AUDIT_NAME} <= set(manifest.files)
    assert manifest.build["warnings"] == []


def test_several_gpus_options_and_sizes_go_into_one_engine(onnx_w4a4, tmp_path):
    profile = {"batch": ShapeRange(1, 2, 4), "height": ShapeRange(8, 8, 16)}
    options = BuildOptions(gpu="rtx3090,rtx4090", optimization_level=2, workspace_mib=256, profile=profile)
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="trt-rtx", options=options)
    assert manifest.build["gpus"] == ["sm_86", "sm_89"]
    assert manifest.build["options"] == {"optimization_level": 2, "workspace_mib": 256}
    assert manifest.profile["height"] == ShapeRange(8, 8, 16)
    assert "export with --dtype fp16" in manifest.build["warnings"][0]


def test_a_site_that_is_computed_in_floating_point_fails_the_build(with_runtime_scale, tmp_path):
    with pytest.raises(UnsupportedError, match=r"1 of \d+ quantized sites did not land in an integer layer .* 'time_embedding.linear_2'"):
        build_engine(with_runtime_scale("time_embedding.linear_2"), tmp_path / "engine", backend="trt-rtx", options=RTX_3090)
    assert not (tmp_path / "engine").exists()


@pytest.mark.extended
def test_float_sites_can_be_allowed_and_are_warnings(with_runtime_scale, tmp_path):
    options = BuildOptions(gpu="rtx3090", allow_float_sites=True)
    manifest = build_engine(with_runtime_scale("time_embedding.linear_2"), tmp_path / "engine", backend="trt-rtx", options=options)
    assert [site for site, plan in manifest.plan.items() if plan.executed == "float"] == ["time_embedding.linear_2"]
    assert manifest.build["warnings"][0].startswith("time_embedding.linear_2: ")


def test_a_builder_that_crashes_is_one_clear_error(with_runtime_scale, tmp_path):
    # A convolution whose Q/DQ scale is computed at run time ends TensorRT-RTX 1.7's builder with a segmentation fault.
    with pytest.raises(UnsupportedError, match=r"The builder crashed \(SIG\w+\)"):
        build_engine(with_runtime_scale("conv_out"), tmp_path / "engine", backend="trt-rtx", options=RTX_3090)
    assert not (tmp_path / "engine").exists()


def test_a_gpu_that_it_cannot_build_for_is_refused(onnx_w4a4, tmp_path):
    with pytest.raises(UnsupportedError, match=r"cannot build for sm_90; it can for sm_75, .* Use --backend trt"):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="trt-rtx", options=BuildOptions(gpu="h200"))


def test_an_unknown_gpu_is_refused_with_the_nearest(onnx_w4a4, tmp_path):
    with pytest.raises(UnsupportedError, match=r"No GPU 'rtx3900' is known\. Did you mean 'rtx3090'"):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="trt-rtx", options=BuildOptions(gpu="rtx3900"))


def test_an_optimization_level_out_of_range_is_refused(onnx_w4a4, tmp_path):
    with pytest.raises(UnsupportedError, match="--optimization-level 6: expected 0 to 5"):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="trt-rtx", options=BuildOptions(optimization_level=6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_gpu_it_does_not_open(engine, device):
    with pytest.raises(UnsupportedError, match=r"needs an NVIDIA GPU \(built for sm_86\)"):
        open_session(engine, device=device)


def fake_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "another GPU")


def test_an_engine_for_another_gpu_is_refused_before_it_is_read(engine, monkeypatch):
    fake_gpu(monkeypatch, (8, 9))
    with pytest.raises(UnsupportedError, match=r"built for sm_86; another GPU is sm_89. Build it again for this GPU"):
        open_session(engine, device="cuda")


def test_an_engine_of_another_version_is_refused_before_it_is_read(engine, monkeypatch):
    fake_gpu(monkeypatch, (8, 6))
    content = json.loads((engine / NAME).read_text())
    content["build"]["versions"]["tensorrt_rtx"] = "1.0"
    original = (engine / NAME).read_text()
    try:
        (engine / NAME).write_text(json.dumps(content))
        with pytest.raises(UnsupportedError, match=r"was built with tensorrt_rtx 1\.0; installed is"):
            open_session(engine, device="cuda")
    finally:
        (engine / NAME).write_text(original)

import dataclasses

import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from engines.nvidia.ort_providers import ProviderSettings, check_provider_options, profile_shapes, provider_entries, settings_of

CUDA = torch.device("cuda:1")
FIXED = ShapeRange(8, 8, 8)


@pytest.fixture
def manifest(onnx_w4a4, monkeypatch, tmp_path):
    """A graph of 1 to 8 samples; compiled things are kept in `tmp_path / "cache"`."""
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    return dataclasses.replace(
        Manifest.read(onnx_w4a4, kind="onnx"), profile={"batch": ShapeRange(1, 4, 8), "height": FIXED, "width": FIXED}
    )


def entries(manifest, **settings):
    return provider_entries(ProviderSettings(**settings), manifest, CUDA, version="1.31.1")


def test_every_provider_is_followed_by_those_that_take_what_it_does_not_support(manifest):
    assert [name for name, _ in entries(manifest, provider="cpu")] == ["CPUExecutionProvider"]
    assert entries(manifest, provider="cuda") == [("CUDAExecutionProvider", {"device_id": "1"}), ("CPUExecutionProvider", {})]
    names = [name for name, _ in entries(manifest, provider="tensorrt")]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_cuda_graph_is_captured_by_the_first_provider_alone(manifest):
    assert entries(manifest, provider="cuda", cuda_graphs=True)[0][1] == {"device_id": "1", "enable_cuda_graph": "True"}
    tensorrt, cuda, _ = entries(manifest, provider="tensorrt", cuda_graphs=True)
    assert tensorrt[1]["trt_cuda_graph_enable"] == "True"
    assert cuda[1] == {"device_id": "1"}


def test_tensorrt_gets_explicit_int8_caches_and_the_shapes_of_the_profile(manifest, tmp_path):
    options = entries(manifest, provider="tensorrt", optimization_level=3, workspace_mib=2)[0][1]
    engines, timings = (options.pop(f"trt_{what}_cache_path") for what in ("engine", "timing"))
    assert engines.startswith(str(tmp_path / "cache" / "tensorrt"))
    assert timings == str(tmp_path / "cache" / "tensorrt" / "timings")
    assert options == {
        "device_id": "1",
        "trt_int8_enable": "True",
        "trt_fp16_enable": "False",
        "trt_engine_cache_enable": "True",
        "trt_timing_cache_enable": "True",
        "trt_profile_min_shapes": "sample:1x3x8x8,timestep:1",
        "trt_profile_opt_shapes": "sample:4x3x8x8,timestep:4",
        "trt_profile_max_shapes": "sample:8x3x8x8,timestep:8",
        "trt_builder_optimization_level": "3",
        "trt_max_workspace_size": "2097152",
    }


def test_float16_is_allowed_where_it_is_requested_or_the_graph_has_it(manifest):
    half = dataclasses.replace(manifest, dtype="fp16")
    assert entries(half, provider="tensorrt")[0][1]["trt_fp16_enable"] == "True"
    assert entries(manifest, provider="tensorrt", precision="fp16")[0][1]["trt_fp16_enable"] == "True"


def test_a_graph_without_dynamic_dimensions_needs_no_profile(manifest):
    fixed = tuple(
        dataclasses.replace(declared, dims=tuple(8 if isinstance(dim, str) else dim for dim in declared.dims))
        for declared in manifest.inputs
    )
    options = entries(dataclasses.replace(manifest, inputs=fixed), provider="tensorrt")[0][1]
    assert not [name for name in options if name.startswith("trt_profile")]


def test_other_weights_of_the_same_graph_have_engines_of_their_own(manifest):
    def folder(**change):
        return entries(dataclasses.replace(manifest, **change), provider="tensorrt")[0][1]["trt_engine_cache_path"]

    trained_again = {**manifest.files, "model.onnx": "0" * 64}
    folders = {folder(), folder(files=trained_again), folder(profile={**manifest.profile, "batch": ShapeRange(1, 4, 4)})}
    assert len(folders) == 3
    assert folder() in folders


def test_a_cache_that_cannot_be_written_is_refused_with_the_variable_that_moves_it(manifest, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UnsupportedError, match="Set EDM_DEPLOY_CACHE to a directory that can be written"):
        entries(manifest, provider="tensorrt")


REFUSED = {
    "precision of another provider": (
        {"precision": "fp16"},
        "--precision is for TensorRT, and the provider is cpu. Add --provider tensorrt",
    ),
    "workspace of another provider": (
        {"provider": "cuda", "workspace_mib": 1},
        "--workspace-mib is for TensorRT, and the provider is cuda",
    ),
    "graphs on the cpu": ({"cuda_graphs": True}, "--cuda-graphs needs a GPU, and the provider is cpu. Add --provider cuda or tensorrt"),
    "graphs of several sizes": (
        {"provider": "cuda", "cuda_graphs": True, "profile": {"batch": ShapeRange(1, 4, 8)}},
        "--cuda-graphs needs one size of each dimension, and --batch is 1:4:8. Pass one number, such as --batch 4.",
    ),
    "unknown precision": ({"provider": "tensorrt", "precision": "bf16"}, "the provider tensorrt has fp32 and fp16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together_are_refused(name, manifest):
    options, message = REFUSED[name]
    with pytest.raises(InputError) as caught:
        check_provider_options(BuildOptions(**options), manifest)
    assert message in str(caught.value)


def test_float32_of_a_float16_graph_is_refused(manifest):
    with pytest.raises(InputError, match=r"this graph is float16\. Export it again with --dtype fp32"):
        check_provider_options(BuildOptions(provider="tensorrt", precision="fp32"), dataclasses.replace(manifest, dtype="fp16"))


def test_an_engine_without_a_provider_runs_on_the_one_of_its_device():
    assert settings_of({"threads": 2}, torch.device("cpu")) == ProviderSettings(provider="cpu")
    assert settings_of({"threads": 2}, CUDA) == ProviderSettings(provider="cuda")
    chosen = {"threads": None, "provider": "tensorrt", "cuda_graphs": True, "precision": "fp16", "workspace_mib": None}
    assert settings_of(chosen, CUDA) == ProviderSettings(provider="tensorrt", cuda_graphs=True, precision="fp16")
    with pytest.raises(UnsupportedError, match=r"provider tensorrt, and device is cpu\. Open it with device='cuda'"):
        settings_of(chosen, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="not on meta"):
        settings_of({}, torch.device("meta"))


def test_profile_shapes_name_every_dynamic_input(manifest):
    assert profile_shapes(manifest)["max"] == "sample:8x3x8x8,timestep:8"

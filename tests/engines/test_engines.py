import shutil

import pytest

import engines
from edm_deploy import registry
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.runtime.backend import Backend, BuildOptions, BuildResult
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from engines import build_engine, complete_profile


def test_every_backend_has_a_target_and_its_own_file_name():
    for name in registry.names(engines):
        backend = registry.load(engines, name, "BACKEND")
        assert isinstance(backend, Backend)
        assert backend.name == name == backend.target.backend


def test_an_engine_directory_is_complete(onnx_w4a4, tmp_path):
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="ort")
    assert manifest == Manifest.read(tmp_path / "engine", kind="engine")
    assert manifest.backend == "ort"
    assert set(manifest.plan) == set(manifest.sites)
    assert {"model_index.json", "scheduler/scheduler_config.json"} < set(manifest.files)
    assert manifest.build["seconds"] > 0
    assert manifest.build["engine_bytes"] > 0
    assert manifest.build["versions"]


def test_an_engine_takes_the_place_of_an_older_one(onnx_w4a4, tmp_path):
    build_engine(onnx_w4a4, tmp_path / "engine", backend="ort")
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="openvino")
    assert manifest.backend == "openvino"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_profile_defaults_are_the_models_own_sizes(onnx_w4a4):
    manifest = Manifest.read(onnx_w4a4, kind="onnx")
    assert complete_profile(manifest, {}) == {"batch": ShapeRange(1, 16, 64), "height": ShapeRange(8, 8, 8), "width": ShapeRange(8, 8, 8)}


def test_a_requested_profile_is_kept(onnx_w4a4):
    manifest = Manifest.read(onnx_w4a4, kind="onnx")
    assert complete_profile(manifest, {"height": ShapeRange(8, 16, 32)})["height"] == ShapeRange(8, 16, 32)


def test_an_unknown_dimension_is_refused(onnx_w4a4):
    with pytest.raises(InputError, match=r"--tokens: the graph has no dynamic dimension .* It has batch, height, width"):
        complete_profile(Manifest.read(onnx_w4a4, kind="onnx"), {"tokens": ShapeRange(1, 1, 1)})


def test_a_size_that_the_levels_cannot_halve_is_refused(onnx_w4a4):
    with pytest.raises(InputError, match="multiples of 2"):
        complete_profile(Manifest.read(onnx_w4a4, kind="onnx"), {"width": ShapeRange(8, 8, 9)})


@pytest.mark.parametrize(
    ("backend", "option", "value"),
    [
        ("ort", "gpu", "rtx3090"),
        ("openvino", "timing_cache", "file"),
        ("trt-rtx", "precision", "bf16"),
        ("trt-rtx", "timing_cache", "file"),
        ("trt", "gpu", "l4"),
    ],
)
def test_an_option_that_the_backend_does_not_support_is_refused(onnx_w4a4, tmp_path, backend, option, value):
    with pytest.raises(UnsupportedError, match=f"{backend} has no option --{option.replace('_', '-')}"):
        build_engine(onnx_w4a4, tmp_path / "engine", backend=backend, options=BuildOptions(**{option: value}))
    assert not list(tmp_path.iterdir())


def test_an_unknown_backend_is_refused_with_the_nearest(onnx_w4a4, tmp_path):
    with pytest.raises(UnsupportedError, match="Did you mean 'openvino'"):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="openvno")


def test_a_graph_that_does_not_match_its_manifest_is_refused(onnx_w4a4, tmp_path):
    shutil.copytree(onnx_w4a4, tmp_path / "onnx")
    with (tmp_path / "onnx" / "model.onnx").open("r+b") as graph:
        graph.seek(1000)
        graph.write(b"\0\1\2\3")
    with pytest.raises(ArtifactError, match="does not match"):
        build_engine(tmp_path / "onnx", tmp_path / "engine", backend="ort")


def test_a_build_that_fails_leaves_nothing(onnx_w4a4, tmp_path, monkeypatch):
    def fail(self, onnx, manifest, options, out):
        (out / "half").write_bytes(b"half an engine")
        raise UnsupportedError("no")

    monkeypatch.setattr(type(registry.load(engines, "ort", "BACKEND")), "build", fail)
    with pytest.raises(UnsupportedError):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="ort")
    assert not list(tmp_path.iterdir())


def test_what_the_build_observed_takes_precedence_over_the_capabilities(onnx_w4a4):
    manifest = Manifest.read(onnx_w4a4, kind="onnx")
    backend = registry.load(engines, "openvino", "BACKEND")
    plan = engines.executed_plan(manifest, backend, BuildResult(versions={}, executed={"conv_in": "float"}))
    assert plan["conv_in"].executed == "float"
    assert plan["conv_out"].executed == "int8"
    assert plan["conv_in"].stored == "W8A8"


def test_a_largest_size_binds_the_dimensions_that_the_graph_has():
    from dataclasses import replace

    from edm_deploy.network.family import TIMESTEP
    from tests.conftest import artifact_by_hand

    artifact = artifact_by_hand("sd3")
    whole = Manifest.of(artifact, dict.fromkeys(artifact.sites, "node"), kind="onnx", dtype="fp32", weight_storage="int8")
    with pytest.raises(InputError, match="this model has positions up to 24"):
        complete_profile(whole, {"height": ShapeRange(8, 8, 32)})
    # A graph cut open at its sites takes each site's input, whose size is fixed.
    assert set(complete_profile(replace(whole, inputs=(TIMESTEP,)), {})) == {"batch"}

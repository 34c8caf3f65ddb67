from dataclasses import replace

import pytest

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest
from engines import build_engine
from engines.common.source_backends import options_of


def test_the_options_of_an_engine_are_those_of_its_manifest_without_what_no_option_is_called(onnx_w4a4):
    manifest = Manifest.read(onnx_w4a4, kind="onnx")
    assert options_of(manifest) == BuildOptions()
    build = {"options": {"threads": 2, "precision": "bf16", "of another release": 1}}
    assert options_of(replace(manifest, build=build)) == BuildOptions(threads=2, precision="bf16")


def test_packed_weights_are_refused_where_they_cannot_be_read(onnx_w4a4_packed, tmp_path):
    with pytest.raises(UnsupportedError, match="Export again with --weight-storage int8, or build for ort or openvino"):
        build_engine(onnx_w4a4_packed, tmp_path / "engine", backend="trt-rtx")


def test_an_engine_is_no_onnx_directory(onnx_w4a4, tmp_path):
    build_engine(onnx_w4a4, tmp_path / "engine", backend="ort")
    with pytest.raises(ArtifactError, match="expected an onnx directory"):
        build_engine(tmp_path / "engine", tmp_path / "second", backend="ort")

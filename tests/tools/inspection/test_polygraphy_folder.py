"""Polygraphy itself reads the folder and runs its commands; those of TensorRT as far as it goes without TensorRT."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.inspection import polygraphy_folder
from edm_deploy_tools.inspection.polygraphy_folder import write_polygraphy_folder

pytest.importorskip("polygraphy")
needs_no_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")


@pytest.fixture(scope="module")
def folder(artifact_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("polygraphy") / "folder"
    return path, write_polygraphy_folder(artifact_w4a4, path)


@pytest.fixture
def polygraphy(folder, monkeypatch, capfd):
    """Runs one of the folder's commands in it; returns whether it passed, and what it printed."""
    from polygraphy.tools import main

    def run(*words):
        assert words[0] == "polygraphy"
        monkeypatch.chdir(folder[0])
        monkeypatch.setattr(sys, "argv", list(words))
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        return not code, "".join(capfd.readouterr())

    return run


def command(folder, title):
    return folder[1].commands[title]


def test_every_layer_passes_in_onnx_runtime(folder, polygraphy):
    passed, printed = polygraphy(*command(folder, "Every quantized layer on its own, in ONNX Runtime"))
    assert passed, printed
    assert "conv_in.codes" in printed


def test_one_wrong_code_of_one_layer_fails(folder, polygraphy, artifact_w4a4):
    from polygraphy.comparator import RunResults

    path = folder[0] / "sites" / "outputs.json"
    right = path.read_text()
    results = RunResults.load(str(path))
    outputs = results["reference"][0]
    codes = np.array(outputs["conv_in.codes"])
    codes.flat[0] += 1
    outputs["conv_in.codes"] = codes
    results.save(str(path))
    try:
        passed, printed = polygraphy(*command(folder, "Every quantized layer on its own, in ONNX Runtime"))
    finally:
        path.write_text(right)
    assert not passed
    assert "FAILED | Output: 'conv_in.codes'" in printed


def test_the_denoiser_passes_in_onnx_runtime(folder, polygraphy):
    passed, printed = polygraphy(*command(folder, "The whole denoiser, in ONNX Runtime"))
    assert passed, printed


def test_the_saved_outputs_are_those_of_the_reference(folder, artifact_w4a4):
    import torch
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    (inputs,) = load_json(str(folder[0] / "denoiser" / "inputs.json"))
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    assert tensors["timestep"].tolist() == [250, 750]
    saved = RunResults.load(str(folder[0] / "denoiser" / "outputs.json"))["reference"][0]["prediction"]
    assert np.array_equal(np.array(saved), Reference(artifact_w4a4)(tensors).numpy())


def test_polygraphy_inspects_the_graph(folder, polygraphy):
    passed, printed = polygraphy(*command(folder, "Inputs, outputs and layers of the graph"))
    assert passed
    assert "sample [dtype=float32, shape=('batch', 3, 'height', 'width')]" in printed


@pytest.mark.parametrize(
    "title",
    ["Every quantized layer on its own, in TensorRT", "The whole denoiser, in TensorRT", "TensorRT 10 with float16 where it is faster"],
)
def test_commands_of_tensorrt_become_scripts(folder, polygraphy, title, tmp_path):
    """`--gen-script` parses every option and writes what would run, without TensorRT."""
    passed, printed = polygraphy(*command(folder, title), "--gen-script", str(tmp_path / "script.py"))
    assert passed, printed
    script = (tmp_path / "script.py").read_text()
    assert "EngineFromBytes" in script
    if "denoiser" in title:
        assert "add('sample', min=[1, 3, 8, 8], opt=[2, 3, 8, 8], max=[2, 3, 8, 8]).add('timestep', min=[1], opt=[2], max=[2])" in script


@needs_no_tensorrt
def test_the_search_for_a_precision_starts(folder, polygraphy):
    passed, printed = polygraphy(*command(folder, "Layers of that engine that need float32"))
    assert not passed
    assert "'tensorrt' is required" in printed


def test_its_graphs_are_onnx_directories_and_its_page_has_every_command(folder, artifact_w4a4):
    path, written = folder
    for name in ("denoiser", "sites"):
        assert Manifest.read(path / name, kind="onnx").artifact == artifact_w4a4.digest
    page = (path / "README.md").read_text()
    assert [title for title in written.commands if f"## {title}\n" not in page] == []
    assert all(" ".join(words) in page for words in written.commands.values())
    assert set(json.loads((path / "edm-deploy.json").read_text())["files"]) == {"denoiser", "sites", "README.md"}


def test_layers_that_are_too_large_are_left_out_and_the_page_says_so(artifact_w4a4, tmp_path, monkeypatch):
    monkeypatch.setattr(polygraphy_folder, "MOST_SITE_BYTES", 10)
    written = write_polygraphy_folder(artifact_w4a4, tmp_path / "folder")
    assert written.sites is None
    assert not (tmp_path / "folder" / "sites").exists()
    assert f"would take {written.site_bytes / 1e6:.0f} MB" in (tmp_path / "folder" / "README.md").read_text()


def test_without_polygraphy_the_extra_is_named(artifact_w4a4, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(UnsupportedError, match=r"pip install \"edm-deploy\[polygraphy\]\""):
        write_polygraphy_folder(artifact_w4a4, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.extended
def test_the_sanitized_graph_still_passes_and_can_be_reduced(folder, polygraphy):
    passed, printed = polygraphy(*command(folder, "The graph with one shape, its constants folded"))
    assert passed, printed
    run = command(folder, "The whole denoiser, in ONNX Runtime")
    assert polygraphy(*run[:2], "sanitized.onnx", *run[3:])[0]
    reduce = command(folder, "The smallest graph on which TensorRT and ONNX Runtime differ")
    passed, printed = polygraphy(*reduce[: reduce.index("--check") + 1], "false")
    assert passed, printed


@pytest.mark.extended
def test_a_float16_graph_passes_too(artifact_w4a4, tmp_path, folder, polygraphy, monkeypatch):
    written = write_polygraphy_folder(artifact_w4a4, tmp_path / "half", dtype="fp16")
    for title in ("Every quantized layer on its own, in ONNX Runtime", "The whole denoiser, in ONNX Runtime"):
        words = [
            word.replace("denoiser/", f"{tmp_path}/half/denoiser/").replace("sites/", f"{tmp_path}/half/sites/")
            for word in written.commands[title]
        ]
        passed, printed = polygraphy(*words)
        assert passed, printed

import dataclasses
import importlib.util
import os
import signal
import sys
import types

import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy.storage.directories import write_json
from engines.nvidia import build_process
from engines.nvidia.build_process import BuildRequest, main, run_in_child


def child(tmp_path, monkeypatch, body: str) -> tuple[str, BuildRequest]:
    """A module whose `python -m` is the child process, and a request for it."""
    (tmp_path / "child_of_test.py").write_text(f"import json, os, sys\nrequest = json.load(open(sys.argv[1]))\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return "child_of_test", BuildRequest(graph="model.onnx", engine="e", reply=str(tmp_path / "reply.json"), shapes={"x": [[1], [2], [3]]})


def test_the_child_reads_the_request_and_its_reply_is_returned(tmp_path, monkeypatch):
    module, request = child(tmp_path, monkeypatch, "json.dump({'layers': request['shapes']['x'], 'gpus': []}, open(request['reply'], 'w'))")
    assert run_in_child(module, request, tmp_path) == {"layers": [[1], [2], [3]], "gpus": []}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('a warning', file=sys.stderr); print('No such option.', file=sys.stderr); sys.exit(2)", r"^No such option\.$"),
        ("sys.exit(3)", "exit status 3"),
        (f"os.kill(os.getpid(), {int(signal.SIGSEGV)})", r"^The builder crashed \(SIGSEGV\) on model\.onnx\."),
    ],
    ids=["refused", "silent", "crashed"],
)
def test_a_child_that_fails_is_one_clear_error(tmp_path, monkeypatch, body, message):
    with pytest.raises(UnsupportedError, match=message):
        run_in_child(*child(tmp_path, monkeypatch, body), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_package_is_refused_by_the_child_with_the_remedy(tmp_path):
    request = BuildRequest(graph="model.onnx", engine="e", reply=str(tmp_path / "reply.json"), shapes={})
    with pytest.raises(UnsupportedError, match=r"^tensorrt cannot be imported here .* pip install"):
        run_in_child("engines.trt", request, tmp_path)


def test_a_gpu_that_the_package_cannot_build_for_is_refused_with_those_that_it_can():
    members = {"NONE": 0, "SM120": 3, "SM75": 1, "SM86": 2}
    module = types.SimpleNamespace(
        __name__="tensorrt_rtx", __version__="1.7", ComputeCapability=types.SimpleNamespace(__members__=members, SM86=members["SM86"])
    )
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx 1\.7 cannot build for sm_90; it can for sm_75, sm_86, sm_120\."):
        build_process._compute_capability(module, "sm_90")


@pytest.mark.parametrize("plugins", [True, False])
def test_the_plugins_are_registered_before_the_graph_is_parsed_and_only_where_it_needs_them(tmp_path, monkeypatch, plugins):
    done = []
    request = BuildRequest(graph="model.onnx", engine="e", reply=str(tmp_path / "reply.json"), shapes={}, plugins=plugins)
    write_json(tmp_path / "request.json", dataclasses.asdict(request))
    monkeypatch.setattr(sys, "argv", ["trt", str(tmp_path / "request.json")])
    monkeypatch.setattr("engines.nvidia.build_process.vendor", lambda package, remedy: done.append("imported"))
    monkeypatch.setattr("engines.nvidia.build_process.build_here", lambda module, request: done.append("parsed") or {})
    main("tensorrt", "install it", lambda: done.append("registered"))
    assert done == ["imported", *["registered"] * plugins, "parsed"]

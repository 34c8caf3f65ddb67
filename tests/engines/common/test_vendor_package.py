import json

import pytest

import engines
from edm_deploy import registry
from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.manifest import NAME
from engines import build_engine
from engines.common.vendor_package import vendor


def test_a_package_that_is_missing_is_named_with_the_remedy():
    with pytest.raises(
        UnsupportedError, match=r"no_such_vendor cannot be imported here \(No module named 'no_such_vendor'\)\. Install it\."
    ):
        vendor("no_such_vendor", remedy="Install it.")


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_an_engine_of_another_version_is_refused_before_it_is_read(onnx_w4a4, tmp_path, backend):
    from edm_deploy.runtime.load import open_session

    build_engine(onnx_w4a4, tmp_path / "engine", backend=backend)
    path = tmp_path / "engine" / NAME
    content = json.loads(path.read_text())
    content["build"]["versions"] = dict.fromkeys(content["build"]["versions"], "0.1")
    path.write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match=r"was built with \w+ 0\.1; installed is .* Build it again here"):
        open_session(tmp_path / "engine")


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_an_engine_of_another_backend_is_refused(onnx_w4a4, tmp_path, backend):
    import torch

    other = {"ort": "openvino", "openvino": "ort"}[backend]
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend=other)
    with pytest.raises(UnsupportedError, match=f"Open it with {other}"):
        registry.load(engines, backend, "BACKEND").open(tmp_path / "engine", manifest, torch.device("cpu"))

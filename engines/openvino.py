"""OpenVINO: the fast CPU path, INT8 on AMX or VNNI. The engine is OpenVINO's own graph format, xml and bin."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.lookup import suggestion
from edm_deploy.manifest import Manifest, Range
from edm_deploy.session import Backend, BuildOptions, Built, Session
from engines._vendor import refuse_other_build, vendor

PACKAGE = "openvino"
ENGINE_NAME = "engine.xml"
COMPILED_SHAPES = 4  # compiled models kept in memory; each holds its own copy of the weights


def _openvino() -> Any:
    return vendor(PACKAGE, mend='Install it with pip install "edm-deploy[openvino]".')


class OpenvinoBackend(Backend):
    """OpenVINO on the CPU."""

    name: ClassVar[str] = "openvino"
    options: ClassVar[frozenset[str]] = frozenset({"precision", "threads"})

    def build(self, onnx: Path, manifest: Manifest, options: BuildOptions, out: Path) -> Built:
        ov = _openvino()
        effective = {"precision": self._precision(options.precision), "threads": options.threads}
        model = ov.Core().read_model(onnx)
        model.reshape({declared.name: _partial_shape(ov, declared.dims, options.profile) for declared in manifest.inputs})
        ov.save_model(model, out / ENGINE_NAME, compress_to_fp16=False)
        return Built(versions={PACKAGE: _version(ov)}, options=effective)

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        ov = _openvino()
        refuse_other_build(manifest, self.name, PACKAGE, _version(ov))
        if device.type != "cpu":
            raise UnsupportedError(f"openvino runs on the cpu, not on {device.type}. Open the engine with device='cpu'.")
        return OpenvinoSession(ov, directory / ENGINE_NAME, manifest, device)

    def _precision(self, asked: str | None) -> str:
        known = self.target.rest
        if asked is not None and asked not in known:
            raise InputError(f"--precision {asked!r}: openvino has {' and '.join(known)}.{suggestion(asked, known)}")
        return asked or known[0]


BACKEND = OpenvinoBackend()


class OpenvinoSession:
    """OpenVINO on torch tensors. Dynamic shapes run slower, so a static model is compiled for each set of shapes that is met."""

    def __init__(self, ov: Any, xml: Path, manifest: Manifest, device: torch.device) -> None:
        self.device = device
        self.outputs = manifest.outputs
        self._ov = ov
        self._core = ov.Core()
        self._xml = xml
        self._properties = properties(manifest.build["options"])
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name for inputs by name, on the CPU."""
        request = self._request({name: tuple(value.shape) for name, value in inputs.items()})
        arrays = {name: value.numpy() for name, value in inputs.items()}
        results = request.infer(arrays, share_inputs=True)
        return {name: torch.from_numpy(results[name].copy()) for name in self.outputs}

    def _request(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        key = tuple(shapes.values())
        if key not in self._requests:
            model = self._core.read_model(self._xml)
            model.reshape(dict(shapes))
            self._requests[key] = self._core.compile_model(model, "CPU", self._properties).create_infer_request()
            if len(self._requests) > COMPILED_SHAPES:
                self._requests.popitem(last=False)
        self._requests.move_to_end(key)
        return self._requests[key]


def properties(options: Mapping[str, Any]) -> dict[str, Any]:
    """OpenVINO's compile properties for an engine's options."""
    chosen: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[options["precision"]],
    }
    if options["threads"] is not None:
        chosen["INFERENCE_NUM_THREADS"] = options["threads"]
    return chosen


def _version(ov: Any) -> str:
    return str(ov.__version__).split("-")[0]


def _partial_shape(ov: Any, dims: tuple[str | int, ...], profile: Mapping[str, Range]) -> Any:
    return ov.PartialShape([dim if isinstance(dim, int) else ov.Dimension(profile[dim].min, profile[dim].max) for dim in dims])

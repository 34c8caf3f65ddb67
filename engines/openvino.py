"""OpenVINO: the fast CPU path, INT8 on AMX or VNNI. The engine is OpenVINO's own graph format, xml and bin."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.network.family import TIMESTEP
from edm_deploy.network.graph_names import ROW_NAME, rescaled
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.registry import suggestion
from edm_deploy.runtime.backend import BuildOptions, BuildResult, Session
from edm_deploy.runtime.capabilities import Execution
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from engines.common.source_backends import GraphBackend
from engines.common.vendor_package import refuse_other_build, vendor
from engines.openvino_graph.group_norm import split_group_norms
from engines.openvino_graph.scale_inputs import keep_float32, scales_to_inputs, timestep_path, widen_int4

PACKAGE = "openvino"
ENGINE_NAME = "engine.xml"
TABLES_NAME = "tables.safetensors"
PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
DEQUANTIZED = "/DequantizationMultiply"  # what OpenVINO appends to the name of a product whose scales it has moved behind it
COMPILED_SHAPES = 4  # compiled models kept in memory; each holds its own copy of the weights


def _openvino() -> Any:
    return vendor(PACKAGE, mend='Install it with pip install "edm-deploy[openvino]".')


class OpenvinoBackend(GraphBackend):
    """OpenVINO on the CPU."""

    name: ClassVar[str] = "openvino"
    options: ClassVar[frozenset[str]] = frozenset({"precision", "threads"})

    def build(self, content: Path, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        ov = _openvino()
        effective = {"precision": self._precision(options.precision), "threads": options.threads}
        with _refusals(ov):
            model = ov.Core().read_model(content)
            model.reshape({declared.name: _partial_shape(ov, declared.dims, options.profile) for declared in manifest.inputs})
        save_file(scales_to_inputs(ov, model, manifest.sites), out / TABLES_NAME)
        kept = timestep_path(model, TIMESTEP.name) | split_group_norms(ov, model)
        try:
            ov.save_model(model, out / ENGINE_NAME, compress_to_fp16=False)
        except RuntimeError as err:  # OpenVINO hides the system's reason
            raise ArtifactError(
                f"OpenVINO cannot write {ENGINE_NAME}. Nothing was left behind; free space or choose another path."
            ) from err
        keep_float32(out / ENGINE_NAME, kept)
        return BuildResult(
            versions={PACKAGE: _version(ov)},
            options=effective,
            executed=_executed(ov, out / ENGINE_NAME, effective, manifest),
            warnings=_warnings(ov, effective["precision"]),
        )

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        ov = _openvino()
        refuse_other_build(manifest, self.name, PACKAGE, _version(ov))
        if device.type != "cpu":
            raise UnsupportedError(f"openvino runs on the cpu, not on {device.type}. Open the engine with device='cpu'.")
        return OpenvinoSession(ov, directory, manifest, device)

    def _precision(self, asked: str | None) -> str:
        known = self.target.float_dtypes
        if asked is not None and asked not in known:
            raise InputError(f"--precision {asked!r}: openvino has {' and '.join(known)}.{suggestion(asked, known)}")
        return asked or known[0]


BACKEND = OpenvinoBackend()


class OpenvinoSession:
    """OpenVINO on torch tensors. Dynamic shapes run slower, so a static model is compiled for each set of shapes that is met."""

    def __init__(self, ov: Any, directory: Path, manifest: Manifest, device: torch.device) -> None:
        self.device = device
        self.outputs = manifest.outputs
        self._ov = ov
        self._xml = directory / ENGINE_NAME
        self._properties = properties(manifest.build["options"])
        self._tables = load_file(directory / TABLES_NAME)
        self._row_of_timestep = self._tables.pop(ROW_NAME, torch.zeros(1, dtype=torch.int32))
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], _Compiled] = OrderedDict()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name for inputs by name, on the CPU."""
        compiled = self._for_shapes({name: tuple(value.shape) for name, value in inputs.items()})
        if self._tables:
            rows = table_rows(self._row_of_timestep, inputs[TIMESTEP.name])
            torch.index_select(compiled.tables, 1, rows, out=compiled.looked_up)
        results = compiled.request.infer({name: value.numpy() for name, value in inputs.items()}, share_inputs=True)
        return {name: torch.from_numpy(results[name].copy()) for name in self.outputs}

    def _for_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> _Compiled:
        key = tuple(shapes.values())
        if key not in self._compiled:
            self._compiled[key] = self._compile(shapes)
            if len(self._compiled) > COMPILED_SHAPES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _compile(self, shapes: Mapping[str, tuple[int, ...]]) -> _Compiled:
        batch = shapes[TIMESTEP.name][0]
        lookups = {name: (batch, *table.shape[1:]) for name, table in self._tables.items()}
        with _refusals(self._ov):
            model = _read(self._ov, self._xml)
            model.reshape({**shapes, **lookups})
            request = self._ov.Core().compile_model(model, "CPU", self._properties).create_infer_request()
        looked_up = torch.zeros(len(lookups), batch)
        for (name, shape), row in zip(lookups.items(), looked_up, strict=True):
            request.set_tensor(name, self._ov.Tensor(row.reshape(shape).numpy(), shared_memory=True))
        tables = torch.stack([table.flatten() for table in self._tables.values()]) if lookups else looked_up
        return _Compiled(request, tables, looked_up)


@dataclass(frozen=True)
class _Compiled:
    """A model compiled for one set of shapes.

    Attributes:
        request: Its inference request.
        tables: float32 [S, R], every table of the graph.
        looked_up: float32 [S, B], the memory that the request reads each sample's rows from.
    """

    request: Any
    tables: Tensor
    looked_up: Tensor


def _read(ov: Any, xml: Path) -> Any:
    """An engine's graph, ready to compile."""
    model = ov.Core().read_model(xml)
    widen_int4(ov, model)
    return model


def properties(options: Mapping[str, Any]) -> dict[str, Any]:
    """OpenVINO's compile properties for an engine's options."""
    chosen: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[options["precision"]],
    }
    if options["threads"] is not None:
        chosen["INFERENCE_NUM_THREADS"] = options["threads"]
    return chosen


def _executed(ov: Any, xml: Path, options: Mapping[str, Any], manifest: Manifest) -> dict[str, Execution]:
    """How each site is computed on this machine: the data type that its product runs in, in the compiled graph."""
    with _refusals(ov):
        compiled = ov.Core().compile_model(_read(ov, xml), "CPU", properties(options))
    precisions: dict[str, str] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if str(info["layerType"].astype(str)) in PRODUCTS:
            for name in str(info["originalLayersNames"].astype(str)).split(","):
                precisions[name.removesuffix(DEQUANTIZED)] = str(info["runtimePrecision"].astype(str))
    return {
        # A scale that is the same in all rows becomes part of the product, which then has the name of the multiplication by it.
        name: "int8" if precisions.get(site.node, precisions.get(rescaled(name))) in ("i8", "u8") else "float"
        for name, site in manifest.sites.items()
        if site.quantized_input
    }


def _warnings(ov: Any, precision: Any) -> tuple[str, ...]:
    if precision == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return ("This CPU has no bfloat16 instructions; what --precision bf16 asks for is computed in float32.",)
    return ()


@contextlib.contextmanager
def _refusals(ov: Any) -> Iterator[None]:
    """OpenVINO's own errors, which are all RuntimeError and many lines long, as one line."""
    try:
        yield
    except RuntimeError as err:
        reason = [line for line in str(err).splitlines() if line.strip()][-1].strip()
        raise UnsupportedError(f"OpenVINO {_version(ov)} cannot take the graph: {reason}. Export it again, or build for ort.") from err


def _version(ov: Any) -> str:
    return str(ov.__version__).split("-")[0]


def _partial_shape(ov: Any, dims: tuple[str | int, ...], profile: Mapping[str, ShapeRange]) -> Any:
    return ov.PartialShape([dim if isinstance(dim, int) else ov.Dimension(profile[dim].min, profile[dim].max) for dim in dims])

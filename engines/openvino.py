"""OpenVINO: INT8 on the CPU by AMX or VNNI. The engine is a graph in OpenVINO's format, xml and bin."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.network.family import TIMESTEP
from edm_deploy.network.graph_names import ROW_NAME, rescaled
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.runtime.backend import BuildOptions, BuildResult, Session
from edm_deploy.runtime.capabilities import Execution
from edm_deploy.runtime.graph_inputs import filled_batch
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy.storage.tensor_file import load_tensors
from engines.common.graph_checks import check_graph, check_rows, check_tensors
from engines.common.precision import supported_precision
from engines.common.source_backends import GraphBackend
from engines.common.vendor_package import refuse_other_build, vendor
from engines.openvino_graph.compiled_model import CompiledModel
from engines.openvino_graph.core import core
from engines.openvino_graph.group_norm import split_group_norms
from engines.openvino_graph.integer_products import IN_FLOAT_REASON, exact_integer_products, weights_to_float32
from engines.openvino_graph.scale_inputs import keep_float32, scales_to_inputs, timestep_path, widen_int4
from engines.openvino_graph.silu import split_silus
from engines.openvino_graph.token_layout import transposes_as_views

log = logging.getLogger(__name__)
PACKAGE = "openvino"
ENGINE_NAME = "engine.xml"
WEIGHTS_NAME = "engine.bin"
TABLES_NAME = "tables.safetensors"
PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
DEQUANTIZED = "/DequantizationMultiply"  # suffix that OpenVINO appends to the name of a product when it moves the scales after it
# Compiled models that a session keeps in memory, unless the profile has more `compiled_batches`. Each holds a copy of the weights.
COMPILED_SHAPES = 4


def _openvino() -> Any:
    return vendor(PACKAGE, remedy='Install it with pip install "edm-deploy[openvino]".')


class OpenvinoBackend(GraphBackend):
    """OpenVINO on the CPU.

    A quantized site that OpenVINO does not compute in integers does not fail the build, with or without `--allow-float-sites`; the plan states it as float.
    On a CPU whose INT8 products are not exact (no VNNI, no AMX) none is computed in integers: the build and the session say so.
    """

    name: ClassVar[str] = "openvino"
    options: ClassVar[frozenset[str]] = frozenset({"precision", "threads"})

    def build(self, content: Path, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        ov = _openvino()
        effective = {"precision": supported_precision(options.precision, self.target), "threads": options.threads}
        with _refusals(ov):
            model = core(ov).read_model(content)
            model.reshape({declared.name: _partial_shape(ov, declared.dims, options.profile) for declared in manifest.graph_inputs})
        save_file(scales_to_inputs(ov, model, manifest.sites), out / TABLES_NAME)
        write_graph(ov, model, out / ENGINE_NAME, effective["precision"])
        return BuildResult(
            versions={PACKAGE: _version(ov)},
            options=effective,
            executed=_executed(ov, out / ENGINE_NAME, effective, manifest),
            warnings=_warnings(ov, effective["precision"]),
        )

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        ov = _openvino()
        refuse_other_build(manifest, self.name, PACKAGE, _version(ov))
        manifest.require_files(ENGINE_NAME, WEIGHTS_NAME, TABLES_NAME)
        if device.type != "cpu":
            raise UnsupportedError(f"openvino runs on the cpu, not on {device.type}. Open the engine with device='cpu'.")
        _check_files(ov, directory, manifest)
        if not exact_integer_products(ov) and any(plan.executed == "int8" for plan in manifest.plan.values()):
            log.warning("%s", IN_FLOAT_REASON)
        return OpenvinoSession(ov, directory, manifest, device)


BACKEND = OpenvinoBackend()


def write_graph(ov: Any, model: Any, xml: Path, precision: Any) -> None:
    """Prepare a graph for the CPU, in place, and write it.

    Args:
        ov: The openvino module.
        model: An ov.Model, as read from an exported graph.
        xml: The file; the weights are written to a `.bin` of the same name.
        precision: Of the nodes that are not quantized, as in BuildOptions.

    Raises:
        ArtifactError: The file cannot be written.
    """
    transposes_as_views(ov, model)
    bf16 = precision == "bf16"
    kept = timestep_path(model, TIMESTEP.name) | split_group_norms(ov, model, bf16=bf16)
    if bf16:  # float32 keeps OpenVINO's own SiLU, and with it its last bits
        split_silus(ov, model)
    try:
        ov.save_model(model, xml, compress_to_fp16=False)
    except RuntimeError as err:  # OpenVINO does not report the system's reason
        raise ArtifactError(f"OpenVINO cannot write {xml.name}. Nothing was left behind; free space or choose another path.") from err
    keep_float32(xml, kept)


def compile_graph(ov: Any, xml: Path, options: Mapping[str, Any]) -> Any:
    """Compile a graph of `write_graph` for this CPU, with the options of a build."""
    with _refusals(ov):
        return core(ov).compile_model(_read(ov, xml), "CPU", properties(ov, options))


def save_graph(graph: Path, xml: Path) -> None:
    """Write an ONNX graph, with its tables inside and dynamic sizes, as OpenVINO's `model.xml` and `model.bin`, for servers that look nothing up themselves."""
    ov = _openvino()
    with _refusals(ov):
        ov.save_model(core(ov).read_model(graph), xml, compress_to_fp16=False)


class OpenvinoSession(Session):
    """OpenVINO on torch tensors. Dynamic shapes run slower, so a static model is compiled for each set of input shapes.

    Compiling takes as long as 20 calls or more, so a batch is filled up to the next of `compiled_batches`, which depends on its size alone: results do not
    depend on the calls before. Samples of a batch do not influence each other; the filling, copies of the last sample, is cut off.

    Threads may share a compiled model but not an infer request (OpenVINO raises ov::Busy where they do). A call takes a request, with its buffer of
    looked-up scales, from the model's idle ones, creates one where none is idle, and returns it. So there are at most as many requests as calls that ran
    at once. A model is compiled under the session's lock; calls of other shapes wait meanwhile.
    """

    def __init__(self, ov: Any, directory: Path, manifest: Manifest, device: torch.device) -> None:
        super().__init__(device)
        self.outputs = manifest.outputs
        self._batches = compiled_batches(manifest.profile["batch"])
        self._ov = ov
        self._xml = directory / ENGINE_NAME
        self._properties = properties(ov, manifest.build["options"])
        tables = load_tensors(directory / TABLES_NAME)
        self._row_of_timestep = tables.pop(ROW_NAME, torch.zeros(1, dtype=torch.int32))
        self._table_shapes = {name: tuple(table.shape[1:]) for name, table in tables.items()}
        self._tables = torch.stack([table.flatten() for table in tables.values()]) if tables else torch.zeros(0, 1)  # float32 [S, R]
        self._weights = frozenset(declared.name for declared in manifest.adapters.weights) if manifest.adapters else frozenset[str]()
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], CompiledModel] = OrderedDict()  # least recently used first

    def _infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = len(inputs[TIMESTEP.name])
        weights = {name: inputs[name] for name in self._weights}
        by_sample = {name: value for name, value in inputs.items() if name not in self._weights}
        inputs = filled_batch(by_sample, next(size for size in self._batches if size >= batch))
        model = self._for_shapes({name: tuple(value.shape) for name, value in inputs.items()})
        with model.slot() as slot:
            slot.hold(self._ov, weights)
            if len(self._tables):
                torch.index_select(self._tables, 1, table_rows(self._row_of_timestep, inputs[TIMESTEP.name]), out=slot.looked_up)
            results = slot.request.infer({name: value.numpy() for name, value in inputs.items()}, share_inputs=True)
            return {name: torch.from_numpy(results[name][:batch].copy()) for name in self.outputs}

    def _release(self) -> None:
        self._models.clear()

    def _for_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> CompiledModel:
        key = tuple(sorted(shapes.items()))
        with self._lock:
            if key not in self._models:
                # Evict before compiling, so that one more never exists; calls that still use the evicted model keep it until they return.
                while len(self._models) >= max(COMPILED_SHAPES, len(self._batches)):
                    self._models.popitem(last=False)
                self._models[key] = self._compile(shapes)
            self._models.move_to_end(key)
            return self._models[key]

    def _compile(self, shapes: Mapping[str, tuple[int, ...]]) -> CompiledModel:
        batch = shapes[TIMESTEP.name][0]
        lookups = {name: (batch, *shape) for name, shape in self._table_shapes.items()}
        with _refusals(self._ov):
            model = _read(self._ov, self._xml)
            model.reshape({**shapes, **lookups})
            compiled = core(self._ov).compile_model(model, "CPU", self._properties)
        return CompiledModel(self._ov, compiled, lookups)


def compiled_batches(allowed: ShapeRange) -> tuple[int, ...]:
    """The batch sizes that a session compiles, ascending: the profile's three and the powers of two between, so that filling at most doubles a batch.

    Of a profile with no more than COMPILED_SHAPES batch sizes, all.
    """
    sizes = range(allowed.min, allowed.max + 1)
    if len(sizes) <= COMPILED_SHAPES:
        return tuple(sizes)
    powers = (2**exponent for exponent in range(allowed.max.bit_length()))
    return tuple(sorted({allowed.min, allowed.opt, allowed.max, *(power for power in powers if power in sizes)}))


def _check_files(ov: Any, directory: Path, manifest: Manifest) -> None:
    """Raises ArtifactError where the graph or the tables are not those that the manifest describes."""
    with _refusals(ov):
        model = core(ov).read_model(directory / ENGINE_NAME)
        shapes = {
            port.get_any_name(): [None if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()] for port in model.inputs
        }
        outputs = [name for port in model.outputs for name in port.get_names()]
    tables = load_tensors(directory / TABLES_NAME)
    rows = tables.pop(ROW_NAME, None)
    if missing := sorted(set(tables) - set(shapes)):
        raise ArtifactError(f"{TABLES_NAME} has a table {missing[0]!r}, which the graph does not take. Build the engine again.")
    check_graph(manifest, {name: shape for name, shape in shapes.items() if name not in tables}, outputs)
    count = max((len(table) for table in tables.values()), default=1)
    of_each = {name: (torch.float32, (count, *[size or 1 for size in shapes[name][1:]])) for name in tables}
    check_tensors(tables, of_each, of=TABLES_NAME)
    if rows is not None:
        check_rows(rows, count, manifest.num_train_timesteps)
    elif count > 1:
        raise ArtifactError(f"{TABLES_NAME} has tables of {count} rows and no {ROW_NAME!r}. Build the engine again.")


def _read(ov: Any, xml: Path) -> Any:
    """Read an engine's graph, ready to compile on this CPU."""
    model = core(ov).read_model(xml)
    widen_int4(ov, model)
    if not exact_integer_products(ov):
        weights_to_float32(ov, model)
    return model


def properties(ov: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """OpenVINO's compile properties for an engine's options on this CPU."""
    bf16 = options["precision"] == "bf16" and _computes_bf16(ov)
    chosen: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
    if options["threads"] is not None:
        chosen["INFERENCE_NUM_THREADS"] = options["threads"]
    return chosen


def _executed(ov: Any, xml: Path, options: Mapping[str, Any], manifest: Manifest) -> dict[str, Execution]:
    """How each site is executed on this machine, from the data type of its product in the compiled graph."""
    compiled = compile_graph(ov, xml, options)
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


def _computes_bf16(ov: Any) -> bool:
    # Each CPU with bfloat16 has VNNI; where ONEDNN_MAX_CPU_ISA hides both, OpenVINO still lists bfloat16.
    return exact_integer_products(ov) and "BF16" in core(ov).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _warnings(ov: Any, precision: Any) -> tuple[str, ...]:
    without_bf16 = ("This CPU has no bfloat16 instructions; --precision bf16 is computed in float32.",)
    return (without_bf16 if precision == "bf16" and not _computes_bf16(ov) else ()) + (
        () if exact_integer_products(ov) else (IN_FLOAT_REASON,)
    )


@contextlib.contextmanager
def _refusals(ov: Any) -> Iterator[None]:
    """Convert OpenVINO's errors, all of them RuntimeError with many lines, to UnsupportedError with one."""
    try:
        yield
    except RuntimeError as err:
        reason = [line for line in str(err).splitlines() if line.strip()][-1].strip()
        raise UnsupportedError(f"OpenVINO {_version(ov)} cannot take the graph: {reason}. Export it again, or build for ort.") from err


def _version(ov: Any) -> str:
    return str(ov.__version__).split("-")[0]


def _partial_shape(ov: Any, dims: tuple[str | int, ...], profile: Mapping[str, ShapeRange]) -> Any:
    return ov.PartialShape([dim if isinstance(dim, int) else ov.Dimension(profile[dim].min, profile[dim].max) for dim in dims])

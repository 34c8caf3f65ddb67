"""ONNX Runtime on the CPU or CUDA: the portable default. The engine is the exported graph; ONNX Runtime optimizes it when it is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edm_deploy.errors import UnsupportedError, first_line
from edm_deploy.models import family_named
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.backend import BuildOptions, BuildResult, Session
from edm_deploy.runtime.capabilities import Execution
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.leftovers import scratch_directory
from engines.common.graph_checks import check_graph
from engines.common.source_backends import GraphBackend, graph_files
from engines.common.vendor_package import refuse_other_build, vendor

PACKAGE = "onnxruntime"
INTEGER_KERNELS = ("QLinearConv", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul")
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def _onnxruntime() -> Any:
    return vendor(PACKAGE, remedy='Install it with pip install "edm-deploy[ort]".')


class OrtBackend(GraphBackend):
    """ONNX Runtime.

    The CPU provider computes convolutions on exact codes in floating point, and those linear sites that it does not fuse. Neither fails a build, with or
    without `--allow-float-sites`; the plan states how each site is executed.
    """

    name: ClassVar[str] = "ort"
    options: ClassVar[frozenset[str]] = frozenset({"threads"})

    def build(self, content: Path, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        ort = _onnxruntime()
        for name in manifest.files:
            if name.startswith(GRAPH_NAME):  # the graph, and its weights where they are separate files
                shutil.copyfile(content.parent / name, out / name)
        return BuildResult(
            versions={PACKAGE: ort.__version__},
            options={"threads": options.threads},
            executed=_executed(ort, out / GRAPH_NAME, manifest),
        )

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        ort = _onnxruntime()
        refuse_other_build(manifest, self.name, PACKAGE, ort.__version__)
        manifest.require_files(*graph_files(directory))
        if device.type == "cuda" and CUDA not in ort.get_available_providers():
            raise UnsupportedError(
                "This ONNX Runtime has no CUDA provider. Install onnxruntime-gpu in its place, or open the engine with device='cpu'."
            )
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"ort runs on cpu and cuda, not on {device.type}. Open the engine with device='cpu'.")
        return OrtSession(ort, directory / GRAPH_NAME, manifest, device)


BACKEND = OrtBackend()


class OrtSession(Session):
    """An ONNX Runtime session on torch tensors, without copies on the way in.

    Calls run in parallel: several threads may call Run on one InferenceSession, and each call has a separate IOBinding.
    Source: onnxruntime.ai/docs/reference/high-level-design.html, "Key design decisions".
    """

    def __init__(self, ort: Any, graph: Path, manifest: Manifest, device: torch.device) -> None:
        super().__init__(device)
        self.outputs = manifest.outputs
        self._session = _session(ort, graph, device, threads=manifest.build["options"]["threads"])
        shapes = {entry.name: [size if isinstance(size, int) else None for size in entry.shape] for entry in self._session.get_inputs()}
        check_graph(manifest, shapes, [entry.name for entry in self._session.get_outputs()])

    def _infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        binding = self._session.io_binding()
        contiguous = {name: value.contiguous() for name, value in inputs.items()}  # the binding takes an address, no strides
        for name, value in contiguous.items():
            binding.bind_input(name, self.device.type, self.device.index or 0, _numpy_type(value), tuple(value.shape), value.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime runs on another stream
        self._session.run_with_iobinding(binding)
        return {name: torch.utils.dlpack.from_dlpack(value) for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def _release(self) -> None:
        self._session = None


def _numpy_type(value: Tensor) -> Any:
    return torch.zeros(0, dtype=value.dtype).numpy().dtype.type


def _session(ort: Any, graph: Path, device: torch.device, *, threads: int | None, profile_prefix: str | None = None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Weight-only sites in float, as the plan states: by default ONNX Runtime quantizes their activations to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    providers: list[Any] = [(CUDA, {"device_id": device.index or 0}), CPU] if device.type == "cuda" else [CPU]
    try:
        return ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as err:  # onnxruntime's classes derive from Exception alone
        raise UnsupportedError(f"ONNX Runtime {ort.__version__} cannot load the graph: {first_line(err)}.") from err


def _executed(ort: Any, graph: Path, manifest: Manifest) -> dict[str, Execution]:
    """How each site is executed on the CPU, from the operator types that one profiled run called."""
    with scratch_directory("ort") as scratch:
        session = _session(ort, graph, torch.device("cpu"), threads=None, profile_prefix=f"{scratch}/ort")
        session.run(
            None,
            {declared.name: _smallest(declared.dims, declared.dtype(manifest.torch_dtype), manifest) for declared in manifest.graph_inputs},
        )
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = {
        event["name"].removesuffix("_kernel_time"): event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")
    }
    return {name: _execution(kernels, site.node) for name, site in manifest.sites.items() if site.quantized_input}


def _smallest(dims: tuple[str | int, ...], dtype: torch.dtype, manifest: Manifest) -> Any:
    """Zeros of the smallest valid shape: dynamic dimensions at the size in the model's config, a batch of one."""
    sizes = family_named(manifest.family).sizes(manifest.config)
    return torch.zeros([sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in dims], dtype=dtype).numpy()


def _execution(kernels: Mapping[str, str], node: str) -> Execution:
    return "int8" if kernels.get(node) in INTEGER_KERNELS else "float"

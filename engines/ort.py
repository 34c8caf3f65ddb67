"""ONNX Runtime on the CPU, CUDA or TensorRT: the portable default. The engine is the exported graph; ONNX Runtime optimizes it when it is opened."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
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
from engines.nvidia.ort_fixed_buffers import FixedBuffers
from engines.nvidia.ort_providers import OF_TENSORRT, ProviderSettings, check_provider_options, device_of, provider_entries, settings_of

PACKAGE = "onnxruntime"
DISTRIBUTIONS = (PACKAGE, "onnxruntime-gpu")  # two packages that install the same module
INTEGER_KERNELS = ("QLinearConv", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul")
UNINSTALL = "Run pip uninstall onnxruntime onnxruntime-gpu, then pip install"
TORCH = "a torch of the same major version of CUDA"
LIBRARIES = {"cuda": TORCH, "tensorrt": f"TensorRT 10 (pip install 'tensorrt>=10.9,<11') and {TORCH}"}
UNOBSERVED = "ONNX Runtime does not report TensorRT's layers: INT8 is what the Q/DQ nodes request, and was not observed."


def _onnxruntime() -> Any:
    """The module onnxruntime; UnsupportedError where it is missing, or incomplete because one of two packages was removed."""
    ort = vendor(PACKAGE, remedy='Install it with pip install "edm-deploy[ort]", or with NVIDIA GPUs "edm-deploy[ort-gpu]".')
    if not hasattr(ort, "InferenceSession"):
        raise UnsupportedError(
            f"The module onnxruntime is incomplete ({_installed()}): onnxruntime and onnxruntime-gpu install the same files, and one was removed. "
            f'{UNINSTALL} "edm-deploy[ort]" or, with NVIDIA GPUs, "edm-deploy[ort-gpu]".'
        )
    return ort


def _installed() -> str:
    """Which packages of DISTRIBUTIONS are installed, as a phrase."""
    found = []
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return f"{'both ' if len(found) > 1 else ''}{' and '.join(found) or 'neither package'} installed"


def check_provider(ort: Any, settings: ProviderSettings) -> None:
    """Raises UnsupportedError where the installed onnxruntime does not have the provider."""
    available = ort.get_available_providers()
    if settings.name not in available:
        raise UnsupportedError(
            f"onnxruntime {ort.__version__} has no {settings.name}: it has {', '.join(available)} ({_installed()}). "
            f"{UNINSTALL} \"edm-deploy[ort-gpu]\", or use the CPU: --provider cpu, device='cpu'."
        )


class OrtBackend(GraphBackend):
    """ONNX Runtime.

    An engine is built for a provider, or for none: then it opens on the CPU or on CUDA, as its device is. The CPU provider computes convolutions on exact codes in floating point, and those linear sites that it does not fuse. Neither fails a build, with or
    without `--allow-float-sites`; the plan states how each site is executed.
    """

    name: ClassVar[str] = "ort"
    options: ClassVar[frozenset[str]] = frozenset(
        {"threads", "provider", "cuda_graphs", "precision", "optimization_level", "workspace_mib"}
    )

    def build(self, content: Path, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        check_provider_options(options, manifest)
        ort = _onnxruntime()
        recorded = _recorded(options)
        settings = settings_of(recorded, torch.device(device_of(recorded)))
        check_provider(ort, settings)
        for name in manifest.files:
            if name.startswith(GRAPH_NAME):  # the graph, and its weights where they are separate files
                shutil.copyfile(content.parent / name, out / name)
        on_tensorrt = settings.provider == "tensorrt"
        requested: dict[str, Execution] = {name: "int8" for name, site in manifest.sites.items() if site.quantized_input}
        return BuildResult(
            versions={PACKAGE: ort.__version__},
            options=recorded,
            executed=requested if on_tensorrt else _executed(ort, out / GRAPH_NAME, manifest, settings),
            warnings=(UNOBSERVED,) if on_tensorrt else (),
        )

    def default_device(self, manifest: Manifest) -> str:
        return device_of(manifest.build["options"])

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        ort = _onnxruntime()
        refuse_other_build(manifest, self.name, PACKAGE, ort.__version__)
        manifest.require_files(*graph_files(directory))
        settings = settings_of(manifest.build["options"], device)
        check_provider(ort, settings)
        return OrtSession(ort, directory / GRAPH_NAME, manifest, device, settings)


BACKEND = OrtBackend()


class OrtSession(Session):
    """An ONNX Runtime session on torch tensors, without copies on the way in.

    Calls run in parallel: several threads may call Run on one InferenceSession, and each call has a separate IOBinding.
    Source: onnxruntime.ai/docs/reference/high-level-design.html, "Key design decisions".

    With CUDA graphs, calls run one after the other on buffers at fixed addresses.
    """

    def __init__(self, ort: Any, graph: Path, manifest: Manifest, device: torch.device, settings: ProviderSettings) -> None:
        super().__init__(device)
        self.outputs = manifest.outputs
        self._session = _session(ort, graph, device, settings=settings, manifest=manifest, threads=manifest.build["options"]["threads"])
        shapes = {entry.name: [size if isinstance(size, int) else None for size in entry.shape] for entry in self._session.get_inputs()}
        check_graph(manifest, shapes, [entry.name for entry in self._session.get_outputs()])
        self._fixed = FixedBuffers(self._session, manifest, device) if settings.cuda_graphs else None

    def _infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._fixed is not None:
            return self._fixed.run(inputs)
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
        if self._fixed is not None:
            self._fixed.close()
        self._fixed = self._session = None


def _recorded(options: BuildOptions) -> dict[str, Any]:
    """Options for the manifest; those of providers only where one was chosen."""
    recorded: dict[str, Any] = {"threads": options.threads}
    if options.provider is not None:
        recorded |= {"provider": options.provider, "cuda_graphs": bool(options.cuda_graphs)}
    if options.provider == "tensorrt":
        recorded |= {name: getattr(options, name) for name in OF_TENSORRT}
    return recorded


def _numpy_type(value: Tensor) -> Any:
    return torch.zeros(0, dtype=value.dtype).numpy().dtype.type


def _session(
    ort: Any,
    graph: Path,
    device: torch.device,
    *,
    settings: ProviderSettings,
    manifest: Manifest,
    threads: int | None,
    profile_prefix: str | None = None,
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Weight-only sites in float, as the plan states: by default ONNX Runtime quantizes their activations to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if settings.cuda_graphs:  # so that what computes shapes is folded: on the CPU it would keep the rest from being captured
        for dim, each in manifest.profile.items():
            options.add_free_dimension_override_by_name(dim, each.opt)
    if settings.provider == "tensorrt":
        with contextlib.suppress(ImportError, OSError):  # without the pip package, the system's TensorRT is found by its path
            importlib.import_module("tensorrt_libs")  # loads libnvinfer, which ONNX Runtime's provider is linked with
    providers = provider_entries(settings, manifest, device, version=ort.__version__)
    try:
        session = ort.InferenceSession(str(graph), options, providers=providers, enable_fallback=0)
    except Exception as err:  # onnxruntime's classes derive from Exception alone
        if type(err) is RuntimeError and settings.provider != "cpu":  # a provider's; of a graph it raises classes of its own
            raise _not_started(ort, settings) from err
        raise UnsupportedError(f"ONNX Runtime {ort.__version__} cannot load the graph: {first_line(err)}.") from err
    if settings.name not in session.get_providers():  # ONNX Runtime itself logs a warning, and takes the next provider
        raise _not_started(ort, settings)
    return session


def _not_started(ort: Any, settings: ProviderSettings) -> UnsupportedError:
    return UnsupportedError(
        f"ONNX Runtime {ort.__version__} could not start {settings.name}: a GPU or a library that it needs is missing. "
        f"Install {LIBRARIES[settings.provider]}, or use the CPU: --provider cpu, device='cpu'."
    )


def _executed(ort: Any, graph: Path, manifest: Manifest, settings: ProviderSettings) -> dict[str, Execution]:
    """How each site is executed on the CPU or on CUDA, from the operator types that one profiled run called."""
    device = torch.device(device_of({"provider": settings.provider}))
    plain = replace(settings, cuda_graphs=False)
    with scratch_directory("ort") as scratch:
        session = _session(ort, graph, device, settings=plain, manifest=manifest, threads=None, profile_prefix=f"{scratch}/ort")
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

"""ONNX Runtime's providers for NVIDIA GPUs: which build options they have, and their options as ONNX Runtime takes them. Imports no onnxruntime.

Not executed on a GPU yet. Source: onnxruntime.ai/docs/execution-providers, pages of the CUDA and the TensorRT execution provider.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edm_deploy.errors import InputError, UnsupportedError, first_line, flag
from edm_deploy.native.code_cache import cache_directory
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.backend import BuildOptions, Provider
from edm_deploy.runtime.manifest import Manifest, ShapeRange

PROVIDER_NAMES: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
OF_TENSORRT = ("precision", "optimization_level", "workspace_mib")  # build options that only its provider has
PRECISIONS = ("fp32", "fp16")
MIB = 1 << 20
ON, OFF = "True", "False"  # the provider of TensorRT accepts no other spelling
Entry = tuple[str, dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class ProviderSettings:
    """What a session of ONNX Runtime runs on.

    Attributes:
        provider: The first provider; what it does not support falls to the next one of tensorrt, cuda, cpu.
        cuda_graphs: Whether a run is captured once and replayed; every dimension then has one size.
        precision: `fp16` lets TensorRT choose float16 for what is between the quantized layers; None is the graph's own type.
        optimization_level: Of TensorRT's builder, 0 to 5; None is TensorRT's.
        workspace_mib: TensorRT's scratch memory in MiB; None is ONNX Runtime's default.
    """

    provider: Provider
    cuda_graphs: bool = False
    precision: str | None = None
    optimization_level: int | None = None
    workspace_mib: int | None = None

    @property
    def name(self) -> str:
        """ONNX Runtime's name of the provider."""
        return PROVIDER_NAMES[self.provider]


def settings_of(options: Mapping[str, object], device: torch.device) -> ProviderSettings:
    """The settings of an engine, from the options in its manifest; where it was built without a provider, that of the device.

    Raises:
        UnsupportedError: The engine was built for a provider of another device, or the device has none.
    """
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"ort runs on cpu and cuda, not on {device.type}. Open the engine with device='cpu'.")
    provider = options.get("provider") or device.type
    expected = device_of(options)
    if options.get("provider") and device.type != expected:
        raise UnsupportedError(
            f"This engine was built for ONNX Runtime's provider {provider}, and device is {device.type}. "
            f"Open it with device={expected!r}, or build it again without --provider."
        )
    chosen = {name: options[name] for name in ("cuda_graphs", *OF_TENSORRT) if options.get(name) is not None}
    return ProviderSettings(provider=provider, **chosen)  # type: ignore[arg-type]  # checked by the manifest's schema


def device_of(options: Mapping[str, object]) -> str:
    """The type of the device that an engine with these options runs on by default."""
    return "cuda" if options.get("provider") in ("cuda", "tensorrt") else "cpu"


def check_provider_options(options: BuildOptions, manifest: Manifest) -> None:
    """Refuse build options that the provider does not have, before anything is built.

    Raises:
        InputError: An option of TensorRT without its provider, CUDA graphs on the CPU or with several sizes of a dimension, an unknown precision.
    """
    provider = options.provider or "cpu"
    for name in OF_TENSORRT:
        if getattr(options, name) is not None and provider != "tensorrt":
            raise InputError(f"{flag(name)} is for TensorRT, and the provider is {provider}. Add --provider tensorrt, or leave it out.")
    if options.precision not in (None, *PRECISIONS):
        raise InputError(f"--precision {options.precision!r}: the provider tensorrt has {' and '.join(PRECISIONS)}.")
    if options.precision == "fp32" and manifest.dtype == "fp16":
        raise InputError("--precision fp32: this graph is float16. Export it again with --dtype fp32, or leave --precision out.")
    if options.cuda_graphs:
        if provider == "cpu":
            raise InputError("--cuda-graphs needs a GPU, and the provider is cpu. Add --provider cuda or tensorrt, or leave it out.")
        check_fixed(options.profile)


def check_fixed(profile: Mapping[str, ShapeRange]) -> None:
    """Raises InputError where a dimension has several sizes: a CUDA graph replays the sizes that it was captured with."""
    for dim, sizes in profile.items():
        if sizes.min != sizes.max:
            raise InputError(
                f"--cuda-graphs needs one size of each dimension, and {flag(dim)} is {sizes.min}:{sizes.opt}:{sizes.max}. "
                f"Pass one number, such as {flag(dim)} {sizes.opt}."
            )


def provider_entries(settings: ProviderSettings, manifest: Manifest, device: torch.device, *, version: str) -> list[Entry]:
    """Providers in order of preference, each with its options as strings, as `InferenceSession(providers=...)` takes them.

    Args:
        settings: Of the session.
        manifest: Of the engine: its graph's inputs, sizes, floating-point type and files.
        device: Its index selects the GPU.
        version: Of onnxruntime; TensorRT's engines are kept by version.

    Raises:
        UnsupportedError: The directory of TensorRT's engines cannot be written.
    """
    cpu: Entry = (PROVIDER_NAMES["cpu"], {})
    if settings.provider == "cpu":
        return [cpu]
    index = str(device.index or 0)
    whole = settings.provider == "cuda" and settings.cuda_graphs  # a graph is captured by the provider that has all nodes
    cuda: Entry = (PROVIDER_NAMES["cuda"], {"device_id": index} | ({"enable_cuda_graph": ON} if whole else {}))
    if settings.provider == "cuda":
        return [cuda, cpu]
    return [(PROVIDER_NAMES["tensorrt"], {"device_id": index} | _tensorrt_options(settings, manifest, version)), cuda, cpu]


def _tensorrt_options(settings: ProviderSettings, manifest: Manifest, version: str) -> dict[str, str]:
    engines, timings = _cache(settings, manifest, version)
    options = {
        "trt_int8_enable": ON,  # explicit Q/DQ: without it TensorRT refuses a graph with INT8 tensors; no calibration table belongs to it
        "trt_fp16_enable": ON if "fp16" in (settings.precision, manifest.dtype) else OFF,
        "trt_engine_cache_enable": ON,
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": ON,
        "trt_timing_cache_path": str(timings),
    }
    shapes = profile_shapes(manifest)
    options |= {f"trt_profile_{which}_shapes": text for which, text in shapes.items() if text}
    if settings.cuda_graphs:
        options["trt_cuda_graph_enable"] = ON
    if settings.optimization_level is not None:
        options["trt_builder_optimization_level"] = str(settings.optimization_level)
    if settings.workspace_mib is not None:
        options["trt_max_workspace_size"] = str(settings.workspace_mib * MIB)
    return options


def profile_shapes(manifest: Manifest) -> dict[str, str]:
    """`sample:1x4x64x64,timestep:1` by `min`, `opt` and `max`: the shapes of all inputs that have a dynamic dimension; empty where none has."""
    dynamic = [declared for declared in manifest.graph_inputs if any(isinstance(dim, str) for dim in declared.dims)]
    return {
        which: ",".join(f"{declared.name}:{'x'.join(map(str, sizes(declared.dims, manifest.profile, which)))}" for declared in dynamic)
        for which in ("min", "opt", "max")
    }


def sizes(dims: Sequence[str | int], profile: Mapping[str, ShapeRange], which: str) -> list[int]:
    """The shape of an input at `min`, `opt` or `max` of a profile."""
    return [dim if isinstance(dim, int) else getattr(profile[dim], which) for dim in dims]


def _cache(settings: ProviderSettings, manifest: Manifest, version: str) -> tuple[Path, Path]:
    """Directories of this engine's TensorRT engines, and of the timings that all share.

    ONNX Runtime names a cached engine by the graph's names and shapes, not by its weights, so that each of our engines has a directory of its own.
    """
    graph = {name: digest for name, digest in manifest.files.items() if name.startswith(GRAPH_NAME)}
    profile = {dim: (each.min, each.opt, each.max) for dim, each in manifest.profile.items()}
    key = hashlib.sha256(json.dumps([graph, profile, vars(settings), version], sort_keys=True).encode()).hexdigest()[:32]
    home = cache_directory("tensorrt")
    try:
        for directory in (home / key, home / "timings"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UnsupportedError(
            f"TensorRT's engines cannot be kept in {home} ({first_line(err)}). Set EDM_DEPLOY_CACHE to a directory that can be written."
        ) from err
    return home / key, home / "timings"

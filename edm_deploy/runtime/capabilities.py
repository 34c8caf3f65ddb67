"""Capabilities of each backend as data, and the execution of every site of an artifact that follows from them; recorded in manifests.

What a rewrite of the network adds besides sites (a Split, a Mul, the two float layers of a branch) every backend computes, so that no entry is about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from edm_deploy import registry
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import Op, QuantizedLayer
from edm_deploy.errors import UnsupportedError
from edm_deploy.numerics.codes import ACTIVATION_BITS, WEIGHT_BITS, WEIGHT_ONLY_BITS, fits_int4
from edm_deploy.numerics.kernel_layout import SPAN4, CodeFormat

Execution = Literal["int4", "int8", "weight-only", "float"]


@dataclass(frozen=True, kw_only=True)
class BackendCapabilities:
    """How a backend computes quantized sites.

    Attributes:
        backend: Name of the backend.
        executes: How a site with quantized weights and inputs is computed, by op.
        reason: Why `executes` is not an integer kernel, where it is not.
        weight_only: How a site with quantized weights only is computed; None where the backend does not support one.
        int4: Whether it multiplies 4-bit integers where a site's codes fit.
        packs_weights: Whether it builds from the artifact and packs weights for its own kernels, in 4 bits where a site's codes fit; the plan states it.
        filters: Filter sizes of the convolutions that it computes in integers; None for any convolution.
        plugins: Whether it runs the nodes of our INT4 plugins.
        int4_storage: Whether packed INT4 initialisers are supported together with quantized activations.
        float_dtypes: Floating-point types that the rest of the graph can run in, the default first.
        recorded_options: Build options that opening an engine reads from its manifest.
    """

    backend: str
    executes: Mapping[Op, Execution]
    reason: str = ""
    weight_only: Execution | None = "weight-only"
    int4: bool = False
    packs_weights: bool = False
    filters: tuple[tuple[int, int], ...] | None = None
    plugins: bool = False
    int4_storage: bool = False
    float_dtypes: tuple[str, ...] = ("fp32",)
    recorded_options: tuple[str, ...] = ()


KERNEL_FILTERS = ((1, 1), (2, 2), (3, 3))  # of our own kernels; 2x2: a transformer's patches

CAPABILITIES: Mapping[str, BackendCapabilities] = {
    target.backend: target
    for target in (
        BackendCapabilities(
            backend="ort",
            executes={"conv2d": "float", "linear": "int8"},
            reason="ONNX Runtime's CPU provider has no integer convolution with a floating-point output: exact codes, float arithmetic",
            int4_storage=True,
            recorded_options=("threads",),
        ),
        BackendCapabilities(
            backend="openvino",
            executes={"conv2d": "int8", "linear": "int8"},
            int4_storage=True,
            float_dtypes=("fp32", "bf16"),
            recorded_options=("precision", "threads"),
        ),
        BackendCapabilities(
            backend="trt-rtx", executes={"conv2d": "int8", "linear": "int8"}, weight_only=None, float_dtypes=("fp16", "fp32")
        ),
        BackendCapabilities(
            backend="trt", executes={"conv2d": "int8", "linear": "int8"}, weight_only=None, plugins=True, float_dtypes=("fp16", "fp32")
        ),
        BackendCapabilities(
            backend="cuda",
            executes={"conv2d": "int8", "linear": "int8"},
            weight_only="float",
            int4=True,
            packs_weights=True,
            filters=KERNEL_FILTERS,
            float_dtypes=("fp16", "bf16"),
            recorded_options=("gpu", "precision"),
        ),
        BackendCapabilities(
            backend="cpu",
            executes={"conv2d": "int8", "linear": "int8"},
            weight_only="float",
            packs_weights=True,
            filters=KERNEL_FILTERS,
            float_dtypes=("bf16", "fp16"),
            recorded_options=("precision", "threads"),
        ),
    )
}


@dataclass(frozen=True)
class SitePlan:
    """The planned execution of one site.

    Attributes:
        stored: The scheme of the site, `W4A4`.
        executed: The arithmetic of its execution.
        codes: The packing of its codes, where the backend chooses one.
    """

    stored: str
    executed: Execution
    codes: CodeFormat | None = None


def capabilities_of(backend: str) -> BackendCapabilities:
    """The capabilities of a backend by name; UnsupportedError lists the known names otherwise."""
    if backend not in CAPABILITIES:
        raise UnsupportedError(f"No backend {backend!r}.{registry.suggestion(backend, CAPABILITIES)} Known: {', '.join(CAPABILITIES)}.")
    return CAPABILITIES[backend]


def check_scheme(target: BackendCapabilities, weight_bits: int, act_bits: int) -> None:
    """Refuse a scheme that a backend does not support, before any work is done.

    Args:
        target: Capabilities of the backend.
        weight_bits: 2 to 8.
        act_bits: 3 to 8, or 16 for weight-only.

    Raises:
        UnsupportedError: The scheme is not supported; the message names the nearest supported one.
    """
    weight_only = act_bits == WEIGHT_ONLY_BITS
    nearest_weight = min(WEIGHT_BITS, key=lambda bits: abs(bits - weight_bits))
    nearest_act = min(ACTIVATION_BITS, key=lambda bits: abs(bits - act_bits))
    if weight_bits in WEIGHT_BITS and (act_bits in ACTIVATION_BITS or (weight_only and target.weight_only)):
        return
    reason = (
        "has no weight-only convolution that keeps its weights in integers"
        if weight_only
        else "computes on codes of 2-8 bit weights and 3-8 bit activations"
    )
    raise UnsupportedError(
        f"W{weight_bits}A{act_bits} cannot be carried by {target.backend}, which {reason}. Nearest: W{nearest_weight}A{nearest_act}."
    )


def check_storage(target: BackendCapabilities, storage: str) -> None:
    """Raises UnsupportedError where `storage` is `int4` and the backend does not read packed INT4 initialisers."""
    if storage == "int4" and not target.int4_storage:
        able = [name for name, other in CAPABILITIES.items() if other.int4_storage]
        raise UnsupportedError(
            f"{target.backend} does not read packed INT4 weights together with quantized activations. "
            f"Export again with --weight-storage int8, or build for {' or '.join(able)}."
        )


def check_plugins(target: BackendCapabilities | None, sites: int) -> None:
    """Raises UnsupportedError where `sites` > 0 sites are plugin nodes and the backend, or any backend for None, does not run them."""
    if not sites or (target is not None and target.plugins):
        return
    able = " or ".join(name for name, other in CAPABILITIES.items() if other.plugins)
    if target is None:
        raise UnsupportedError(f"--int4 plugin writes nodes that only {able} runs. Add --for {able}, or leave --int4 out.")
    raise UnsupportedError(
        f"{target.backend} does not run INT4 plugin nodes, which only {able} does, and this graph is for them. "
        f"Export again without --int4 plugin, or build with --backend {able}."
    )


def plan_layers(artifact: Artifact, target: BackendCapabilities) -> dict[str, SitePlan]:
    """The planned execution of each site on a backend, by site name."""
    layers = artifact.family_object.sites(artifact.skeleton())
    return {name: site_plan(site, layers[name], target) for name, site in artifact.sites.items()}


def site_plan(site: QuantizedLayer, layer: nn.Conv2d | nn.Linear, target: BackendCapabilities) -> SitePlan:
    """The planned execution of one site: determined by its op, the shape of its layer and, with kernels of our own, its codes and bounds."""
    executed = execution(site.op, site.activation is not None, target)
    if target.filters is not None and site.activation is not None:
        executed = "float" if unsupported_reason(layer, target.filters) else executed
    if not target.packs_weights or executed != "int8":
        return SitePlan(site.scheme, executed)
    kind = code_format(site)
    return SitePlan(site.scheme, "int4" if target.int4 and kind != "s8" else "int8", kind)


def execution(op: Op, quantized_input: bool, target: BackendCapabilities) -> Execution:
    """How a backend computes a site of this op, whatever its codes are."""
    return target.executes[op] if quantized_input else (target.weight_only or "float")


def unsupported_reason(layer: nn.Conv2d | nn.Linear, filters: tuple[tuple[int, int], ...]) -> str | None:
    """Why the integer kernels do not compute a layer, as a phrase, or None.

    Args:
        layer: The layer; its weights may be on the meta device.
        filters: Filter sizes of the kernels.
    """
    if isinstance(layer, nn.Linear):
        return None
    if layer.groups > 1:
        return f"{layer.groups} groups"
    if max(layer.dilation) > 1:
        return f"dilation {max(layer.dilation)}"
    if layer.kernel_size not in filters:
        return f"a {layer.kernel_size[0]}x{layer.kernel_size[1]} filter"
    if len(set(layer.stride)) > 1 or layer.stride[0] > 2:
        return f"stride {layer.stride[0]}x{layer.stride[1]}"
    if isinstance(layer.padding, str) or len(set(layer.padding)) > 1:
        return f"uneven padding {layer.padding}"
    return None


def code_format(site: QuantizedLayer) -> CodeFormat:
    """The narrowest kernel that computes `site` exactly.

    Returns:
        `s4` where the weight codes and all activation bounds lie in [-8, 7]; `u4` where the weight codes do and no row's bounds span more than 16
        codes, so that `n - qmin` fits in [0, 15]; `s8` for every other pair of integers.

    Raises:
        UnsupportedError: The site quantizes its weight only.
    """
    table = site.activation
    if table is None:
        raise UnsupportedError(
            f"A {site.scheme} site has no integer input; these kernels multiply integers only. Keep it in floating point."
        )
    if not fits_int4(site.codes):
        return "s8"
    if fits_int4(table.qmin) and fits_int4(table.qmax):
        return "s4"
    return "u4" if int((table.qmax.int() - table.qmin.int()).max()) <= SPAN4 else "s8"


def summary(site_plans: Mapping[str, SitePlan]) -> str:
    """`61 sites stored W4A4, executed as INT8; 4 sites stored W8A8, executed as INT8`."""
    counts = Counter((site.stored, site.executed) for site in site_plans.values())
    words = {"int4": "INT4", "int8": "INT8", "weight-only": "weight-only", "float": "float"}
    return "; ".join(f"{count} sites stored {stored}, executed as {words[executed]}" for (stored, executed), count in counts.most_common())

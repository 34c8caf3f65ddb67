"""What each backend can carry, as plain data, and what every site of an artifact becomes on it. Written in manifests, printed, never softened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edm_deploy import lookup
from edm_deploy.artifact import Op, Site
from edm_deploy.errors import UnsupportedError
from edm_deploy.quant import ACTIVATION_BITS, WEIGHT_BITS

Execution = Literal["int4", "int8", "weight-only", "float"]
WEIGHT_ONLY_BITS = 16  # activation bits that stand for "the input is not quantized"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a backend makes of a quantized site.

    Attributes:
        backend: Name of the backend.
        executes: How a site with quantized weights and inputs is computed, by op.
        because: The reason where `executes` is not an integer kernel.
        weight_only: How a site with quantized weights only is computed; None where the backend cannot carry one.
        int4_storage: Whether packed INT4 initialisers can be read beside quantized activations.
        rest: Floating-point types that the rest of the graph can run in, the default first.
    """

    backend: str
    executes: Mapping[Op, Execution]
    because: str = ""
    weight_only: Execution | None = "weight-only"
    int4_storage: bool = False
    rest: tuple[str, ...] = field(default=("fp32",))


TARGETS: Mapping[str, Target] = {
    target.backend: target
    for target in (
        Target(
            backend="ort",
            executes={"conv2d": "float", "linear": "int8"},
            because="ONNX Runtime's CPU provider has no integer convolution with a floating-point output: exact codes, float arithmetic",
            int4_storage=True,
        ),
        Target(backend="openvino", executes={"conv2d": "int8", "linear": "int8"}, int4_storage=True, rest=("fp32", "bf16")),
        Target(backend="trt-rtx", executes={"conv2d": "int8", "linear": "int8"}, weight_only=None, rest=("fp16", "fp32")),
        Target(backend="trt", executes={"conv2d": "int8", "linear": "int8"}, weight_only=None, rest=("fp16", "fp32")),
    )
}


@dataclass(frozen=True)
class SitePlan:
    """What one site becomes.

    Attributes:
        stored: Its scheme, `W4A4`.
        executed: The arithmetic that computes it.
    """

    stored: str
    executed: Execution


def target_named(backend: str) -> Target:
    """The target of a backend; UnsupportedError lists the known ones otherwise."""
    if backend not in TARGETS:
        raise UnsupportedError(f"No backend {backend!r}.{lookup.suggestion(backend, TARGETS)} Known: {', '.join(TARGETS)}.")
    return TARGETS[backend]


def check_scheme(target: Target, weight_bits: int, act_bits: int) -> None:
    """Refuse a scheme before any work is done.

    Args:
        target: Where the model shall run.
        weight_bits: 2 to 8.
        act_bits: 3 to 8, or 16 for weight-only.

    Raises:
        UnsupportedError: The target cannot carry it; the message names the nearest that it can.
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


def check_storage(target: Target, storage: str) -> None:
    """Raises UnsupportedError where the target cannot read packed INT4 initialisers and `storage` is `int4`."""
    if storage == "int4" and not target.int4_storage:
        able = [name for name, other in TARGETS.items() if other.int4_storage]
        raise UnsupportedError(
            f"{target.backend} does not read packed INT4 weights beside quantized activations. "
            f"Export again with --weight-storage int8, or build for {' or '.join(able)}."
        )


def plan(sites: Mapping[str, Site], target: Target) -> dict[str, SitePlan]:
    """What each site becomes on a target, by site name."""
    return {name: SitePlan(site.scheme, execution(site.op, site.activation is not None, target)) for name, site in sites.items()}


def execution(op: Op, quantized_input: bool, target: Target) -> Execution:
    """How the target computes a site."""
    return target.executes[op] if quantized_input else (target.weight_only or "float")


def summary(site_plans: Mapping[str, SitePlan]) -> str:
    """`61 sites stored W4A4, executed as INT8; 4 sites stored W8A8, executed as INT8`."""
    counts = Counter((site.stored, site.executed) for site in site_plans.values())
    words = {"int4": "INT4", "int8": "INT8", "weight-only": "weight-only", "float": "float"}
    return "; ".join(f"{count} sites stored {stored}, executed as {words[executed]}" for (stored, executed), count in counts.most_common())

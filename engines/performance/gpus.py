"""NVIDIA GPUs: names, compute capabilities, and the figures from which expected times are computed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edm_deploy.errors import UnsupportedError
from edm_deploy.registry import suggestion
from engines.kernels.driver import LEAST_CAPABILITY, arch_of

FIRST_WITHOUT_INT4 = 90  # compute capability, times ten
TABLE = Path(__file__).parent.parent / "profiles" / "gpus.toml"
# Words of a product's full name, as the driver writes it, that say nothing about its compute capability: NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3.
FORM = re.compile(r"nvidia|geforce|tesla|generation|blackwell|(workstation|server)|edition|max|q|\d+gb|sxm\d?|pcie|hbm\d\w?|nvl")
PART = ("laptop", "gpu")  # a laptop's card has the capability of the desktop's, and fewer multiprocessors


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as profiles/gpus.toml describes it, with the source of each number there.

    Attributes:
        name: Short name, `rtx3090`.
        title: NVIDIA's product name.
        sm: Compute capability, `sm_86`.
        sms: Streaming multiprocessors.
        clock: Boost clock, Hz.
        dram: DRAM bandwidth that a copy reaches, bytes per second.
        l2: L2 bandwidth that a read reaches, bytes per second.
        l2_size: L2 cache, bytes.
        ops: Dense tensor-core operations per clock and multiprocessor, by precision; no `int4` where there are no INT4 tensor cores.
    """

    name: str
    title: str
    sm: str
    sms: int
    clock: float
    dram: float
    l2: float
    l2_size: float
    ops: Mapping[str, int]

    @property
    def has_int4(self) -> bool:
        """Whether its tensor cores multiply 4-bit integers."""
        return "int4" in self.ops

    def peak(self, precision: str) -> float:
        """Peak tensor-core operations per second in `precision`; a multiply-accumulate counts as two."""
        return self.ops[precision] * self.sms * self.clock


def capabilities(names: str) -> tuple[str, ...]:
    """Compute capabilities, `sm_86`, of one or more GPU names, each once.

    Args:
        names: `rtx3090`, `RTX 3090`, `sm_86`, `8.6`; several separated by commas.

    Raises:
        UnsupportedError: A name is not in profiles/gpus.toml; the message suggests the nearest.
    """
    return tuple(dict.fromkeys(capability(name) for name in names.split(",")))


def capability(name: str) -> str:
    """Compute capability of one GPU name.

    Raises:
        UnsupportedError: As `capabilities`.
    """
    by_sm: dict[str, list[str]] = _table()["capability"]
    by_name = {gpu: sm for sm, gpus in by_sm.items() for gpu in gpus}
    plain = _plain(name, without=PART)
    number = re.fullmatch(r"(?:sm)?(\d+)\.?(\d)", plain)
    if number and (sm := f"sm_{number[1]}{number[2]}") in by_sm:
        return sm
    if plain not in by_name:
        raise UnsupportedError(
            f"No GPU {name.strip()!r} is known.{suggestion(plain, [*by_name, *by_sm])} Name its compute capability, {', '.join(by_sm)}, or add it to {TABLE.name}."
        )
    return by_name[plain]


def has_kernels(sm: str) -> bool:
    """Whether the kernels run on a compute capability, `sm_86`."""
    return _number(sm) >= _number(arch_of(LEAST_CAPABILITY))


def has_int4(sm: str) -> bool:
    """Whether the kernels multiply 4-bit integers on the tensor cores of a compute capability, `sm_86`; `sm_90` and later have none."""
    return has_kernels(sm) and _number(sm) < FIRST_WITHOUT_INT4


def _number(sm: str) -> int:
    return int(sm.removeprefix("sm_"))


def gpu_named(name: str) -> Gpu:
    """A GPU whose figures are known.

    Args:
        name: `rtx3090`, `RTX 3090`, `NVIDIA H200`, ...

    Raises:
        UnsupportedError: profiles/gpus.toml has no figures for it; the message lists the GPUs that have.
    """
    table, plain = _table()["gpu"], _plain(name)
    if "pcie" in name.lower() and f"{plain}pcie" in table:
        plain += "pcie"
    if plain not in table:
        raise UnsupportedError(
            f"The figures of GPU {name.strip()!r} are not known.{suggestion(plain, table)} Known: {', '.join(table)}. Add them to {TABLE.name} to have expected times."
        )
    facts = table[plain]
    return Gpu(
        name=plain,
        title=facts["title"],
        sm=capability(name),
        sms=facts["sms"],
        clock=facts["clock_mhz"] * 1e6,
        dram=facts["dram_gbps"] * 1e9 * facts["dram_share"],
        l2=facts["l2_gbps"] * 1e9,
        l2_size=facts["l2_mb"] * 1e6,
        ops=facts["ops"],
    )


def gpu_names() -> list[str]:
    """Every GPU whose figures are known."""
    return list(_table()["gpu"])


def launch_seconds(*, graph: bool) -> float:
    """Overhead of a kernel launch, seconds: in a CUDA graph, or one by one on a stream."""
    return float(_table()["launch"]["graph_us" if graph else "stream_us"]) * 1e-6


def _plain(name: str, without: tuple[str, ...] = ()) -> str:
    """`rtx3090` of every way to write it."""
    words = [word for word in re.split(r"[\s_-]+", name.lower()) if not FORM.fullmatch(word) and word not in without]
    return re.sub("nvidia|geforce", "", "".join(words))


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text())

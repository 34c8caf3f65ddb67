"""Call opened engines from several threads for a long time: every result is that of the same call alone, malformed calls are refused, memory does not grow.

    python -m edm_deploy_tools.soak engine-openvino engine-ort --minutes 60

Before it starts, each engine computes 24 calls of mixed shapes and timesteps, one at a time. Threads then repeat them in random order, on all engines at
once, and each result must be equal to the first one in every bit. A result is compared after its thread's next call, so that memory which a later call
overwrites is noticed. About one call in ten is malformed and must raise an error of edm-deploy.

Resident memory is read while no call runs, after a call of each shape in a fixed order (so that what an engine keeps for its last shapes is the same each
time), a collection of Python's garbage and glibc's malloc_trim, which returns freed memory to the system.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from torch import Tensor

from edm_deploy.errors import EdmDeployError, first_line
from edm_deploy_tools.benchmarks.soak_calls import CALLS, SHAPES, PreparedCall, SoakedEngine, prediction, soaked_engine
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.machine import measurement_conditions

MALFORMED = 0.1  # share of the calls
WARM_UP = 0.15  # share of the time, at most WARM_UP_SECONDS
WARM_UP_SECONDS = 600.0
READINGS = 10  # of the memory, the first after the warm-up
LINE_SECONDS = 60.0  # between two lines of progress
KEPT_MESSAGES = 10
COUNTS = ("calls", "refused", "wrong", "errors")
FAILED = 1


@dataclass
class Figures:
    """What has been counted so far.

    Attributes:
        by_engine: By engine `calls`, valid ones whose result was compared; `refused`, malformed ones that raised an error of edm-deploy; `wrong`, results that
            differ from those of the call alone; `errors`, other exceptions and malformed calls that returned.
        resident: Resident memory in bytes; the first reading is after the warm-up.
        messages: Of the first wrong results and errors.
        seconds: Since the start.
    """

    by_engine: dict[str, Counter[str]]
    resident: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, engine: str, what: str, message: str = "") -> None:
        """Add one to a count of an engine; threads may call this at once."""
        with self.lock:
            self.by_engine[engine][what] += 1
            if message and len(self.messages) < KEPT_MESSAGES:
                self.messages.append(f"{engine}: {message}")

    def total(self, what: str) -> int:
        """A count over all engines: `calls`, `refused`, `wrong` or `errors`."""
        with self.lock:
            return sum(counts[what] for counts in self.by_engine.values())

    @property
    def resident_mb(self) -> list[float]:
        """Each reading of resident memory in MB."""
        return [round(size / 1e6, 1) for size in self.resident]

    @property
    def growth_mb(self) -> float:
        """Growth of resident memory after the warm-up, in MB."""
        return (self.resident[-1] - self.resident[0]) / 1e6 if self.resident else 0.0

    def failed(self, max_growth_mb: float) -> bool:
        """Whether a result was wrong, an error unexpected, or the growth of memory above the limit."""
        return bool(self.total("wrong") or self.total("errors")) or self.growth_mb > max_growth_mb

    def summary(self) -> dict[str, Any]:
        """The figures by name, as they are printed."""
        calls = self.total("calls")
        resident = self.resident_mb or [None]
        return {
            "minutes": round(self.seconds / 60, 2),
            "calls": calls,
            "refused calls": self.total("refused"),
            "wrong results": self.total("wrong"),
            "unexpected errors": self.total("errors"),
            "MB after warm-up": resident[0],
            "MB at the end": resident[-1],
            "growth MB": round(self.growth_mb, 1),
            "calls per second": round(calls / self.seconds, 1) if self.seconds else None,
        }


class Soak:
    """A run over some engines; `figures` may be read at any time."""

    def __init__(self, engines: Sequence[SoakedEngine], *, threads: int, seed: int) -> None:
        self.figures = Figures({engine.name: Counter(dict.fromkeys(COUNTS, 0)) for engine in engines})
        self._engines = engines
        self._randoms = [random.Random(f"{seed} {thread}") for thread in range(threads)]
        self._together = threading.Barrier(threads)
        self._stopped = threading.Event()

    def run(self, seconds: float, note: console.Notify = console.silent) -> None:
        """Call the engines for this time, with readings of the memory. After Ctrl-C it reads the memory once more and raises KeyboardInterrupt."""
        started, last_line = time.monotonic(), time.monotonic()
        warm_up = min(WARM_UP * seconds, WARM_UP_SECONDS)
        ends = [warm_up + (seconds - warm_up) * reading / (READINGS - 1) for reading in range(READINGS)]
        with ThreadPoolExecutor(len(self._randoms)) as pool:
            try:
                for end in ends:
                    working = {pool.submit(self._work, each, started + end) for each in self._randoms}
                    while working:
                        done, working = wait(working, timeout=1.0)
                        for future in done:
                            future.result()
                        self.figures.seconds = time.monotonic() - started
                        if time.monotonic() - last_line >= LINE_SECONDS:
                            last_line = time.monotonic()
                            note(self._line(seconds))
                    self._read_memory(pool)
            except KeyboardInterrupt:
                self._stopped.set()
                self._read_memory(pool)
                raise
            finally:
                self._stopped.set()
                self.figures.seconds = time.monotonic() - started

    def _work(self, chance: random.Random, until: float) -> None:
        """Make random calls until a time; one thread's share."""
        pending: tuple[SoakedEngine, PreparedCall, Tensor] | None = None
        while time.monotonic() < until and not self._stopped.is_set():
            engine = chance.choice(self._engines)
            if chance.random() < MALFORMED:
                self._refused(engine, chance.choice(list(engine.malformed)))
                continue
            call = chance.choice(engine.calls)
            found = self._called(engine, call)
            if pending is not None:
                self._compare(*pending)
            pending = None if found is None else (engine, call, found)
        if pending is not None:
            self._compare(*pending)

    def _called(self, engine: SoakedEngine, call: PreparedCall) -> Tensor | None:
        try:
            return prediction(engine.denoiser, call.inputs)
        except Exception as err:  # any exception of a valid call is what is looked for
            self.figures.count(engine.name, "errors", f"{type(err).__name__}: {first_line(err)}")
            return None

    def _compare(self, engine: SoakedEngine, call: PreparedCall, found: Tensor) -> None:
        self.figures.count(engine.name, "calls")
        if not torch.equal(found, call.expected):
            same = found.shape == call.expected.shape
            by = f"{float((found - call.expected).abs().max()):.3g}" if same else f"its shape {list(found.shape)}"
            self.figures.count(engine.name, "wrong", f"a result of shape {list(call.expected.shape)} differs by {by}")

    def _refused(self, engine: SoakedEngine, what: str) -> None:
        try:
            engine.malformed[what]()
        except EdmDeployError:
            self.figures.count(engine.name, "refused")
        except Exception as err:  # any other exception is what is looked for
            self.figures.count(engine.name, "errors", f"{what}: {type(err).__name__}: {first_line(err)}")
        else:
            self.figures.count(engine.name, "errors", f"{what} was not refused")

    def _read_memory(self, pool: ThreadPoolExecutor) -> None:
        """Read resident memory after all threads together have made a call of each shape and each malformed call, in the same order each time."""
        for future in [pool.submit(self._all_kinds) for _ in self._randoms]:
            future.result()
        gc.collect()
        trim_heap()
        self.figures.resident.append(resident_bytes())

    def _all_kinds(self) -> None:
        for engine in self._engines:
            for what in engine.malformed:
                self._refused(engine, what)
            for call in engine.calls[:: CALLS // SHAPES]:
                self._together.wait()
                if (found := self._called(engine, call)) is not None:
                    self._compare(engine, call, found)

    def _line(self, seconds: float) -> str:
        total = self.figures.total
        counts = f"{total('calls')} calls, {total('refused')} refused, {total('wrong')} wrong, {total('errors')} errors"
        resident = console.size_words(resident_bytes())
        return f"{console.time_words(self.figures.seconds)} of {console.time_words(seconds)}: {counts}, memory {resident}"


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


app = run_app.app_with()


@app.command()
def command(
    engines: Annotated[list[Path], typer.Argument(help="Engine directories; they are opened on the CPU.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Duration, after the calls have been prepared.")] = 60.0,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads that call the engines.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the inputs, and of the order of the calls.")] = 0,
    max_growth_mb: Annotated[float, typer.Option(min=0, help="Growth of resident memory after the warm-up that is accepted.")] = 20.0,
    report: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write conditions and figures to a file.")] = None,
) -> None:
    """Call engines from several threads for a long time. Exit code 1 after a wrong result, an unexpected error or too much growth."""
    if report is not None:
        report.open("a").close()  # an hour later would be too late for an error
    soak = Soak([soaked_engine(directory, seed) for directory in engines], threads=threads, seed=seed)
    interrupted = False
    try:
        soak.run(60 * minutes, console.note)
    except KeyboardInterrupt:
        interrupted = True
    show(soak.figures, {"threads": threads, "seed": seed, **measurement_conditions()}, report)
    if soak.figures.failed(max_growth_mb):
        raise typer.Exit(FAILED)
    if interrupted:
        raise typer.Exit(run_app.INTERRUPTED)


def show(figures: Figures, conditions: Mapping[str, Any], path: Path | None) -> None:
    """Print the figures, and write them to `path` with each reading of the memory."""
    console.print_facts({**conditions, **figures.summary()})
    console.print_table("By engine", [{"engine": name, **counts} for name, counts in figures.by_engine.items()])
    for message in figures.messages:
        console.say(message)
    if path is not None:
        details = {"by engine": figures.by_engine, "MB": figures.resident_mb, "messages": figures.messages}
        content = console.finite({"conditions": conditions, "figures": figures.summary(), **details})
        path.write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where the engines failed, 2 after an error, 130 after Ctrl-C."""
    return run_app.run(app, "python -m edm_deploy_tools.soak", arguments)


if __name__ == "__main__":
    run_app.set_passive_openmp()
    sys.exit(main())

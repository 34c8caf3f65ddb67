"""Console output of the commands: figures and written files on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

PLAIN_LINE_SECONDS = 10.0  # between two progress lines if stderr is no terminal
WIDE = 10_000  # columns if stdout is no terminal, so that no line of a log is wrapped

Row = Mapping[str, Any]
Notify = Callable[[str], None]


def silent(text: str) -> None:
    """A Notify that prints nothing."""


def out() -> Console:
    """A console on the current stdout, which a test may have replaced."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)


def err() -> Console:
    """A console on the current stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line on stdout; square brackets are no markup."""
    out().print(text, markup=False)


def note(text: str) -> None:
    """Print a line on stderr, for example the current stage of a long command; square brackets are no markup."""
    err().print(text, markup=False)


def wrote(path: Path, note: str = "") -> None:
    """Print the path and size of a file or directory that was written, and optionally a description of it."""
    out().print(f"Wrote [bold]{escape(str(path))}[/bold] ({size_words(bytes_of(path))}){': ' + escape(note) if note else ''}")


def print_json(content: Mapping[str, Any]) -> None:
    """Print `content` as strict JSON on stdout: a number that is not finite becomes null."""
    sys.stdout.write(json.dumps(finite(content), indent=2, default=str, allow_nan=False) + "\n")


def finite(value: Any) -> Any:  # JSON
    """`value`, a JSON value, with None for each float that is infinite or NaN, which JSON cannot represent."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values, one pair a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        out().print(f"[dim]{name.ljust(width)}[/dim]  {escape(str(value))}", markup=True)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print a table whose columns are the keys of the first row; numbers are aligned right."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", title_style="bold")
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row.values()))
    out().print(table)


def cell(value: Any) -> str:
    """Text of a table cell: four significant digits for a float, a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size_words(size: int) -> str:
    """A number of bytes in decimal units: `4.4 MB`."""
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def time_words(seconds: float) -> str:
    """A duration in readable units: `48 s`, `5 min 12 s`, `2 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files below a directory."""
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else path.stat().st_size


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Any], None]]:
    """A callback for `calibration.run.options.Progress`: shows a bar on a terminal, otherwise prints a line every ten seconds."""
    if not sys.stderr.isatty():
        yield plain_progress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=err(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(now: Any) -> None:
            if now.stage not in tasks:
                tasks[now.stage] = bar.add_task(now.stage, total=now.total, words="")
            bar.update(tasks[now.stage], completed=now.step, total=now.total, words=progress_words(now))

        yield show


def progress_words(now: Any) -> str:
    """Loss, rate, time left and memory of a `Progress`; unknown values are omitted."""
    words = []
    if now.loss is not None:
        words.append(f"loss {now.loss:.4g}")
    if now.rate:
        words.append(f"{now.rate:.2f}/s")
    if now.eta_seconds is not None:
        words.append(f"{time_words(now.eta_seconds)} left")
    if now.memory_bytes:
        words.append(f"memory {size_words(now.memory_bytes)}")
    return ", ".join(words)


def plain_progress() -> Callable[[Any], None]:
    """A callback that prints a line of progress every ten seconds and at the end of each stage."""
    last: dict[str, Any] = {"stage": "", "time": 0.0}

    def show(now: Any) -> None:
        due = time.monotonic() - last["time"] >= PLAIN_LINE_SECONDS
        if now.stage != last["stage"] or due or now.step == now.total:
            last.update(stage=now.stage, time=time.monotonic())
            sys.stderr.write(f"{now.stage} {now.step}/{now.total} {progress_words(now)}".rstrip() + "\n")
            sys.stderr.flush()

    return show


def training_progress(total: int, *, first: int = 0, device: Any = "cpu") -> Callable[[int, float], None]:
    """A callback for a training loop, called with the number of steps done and the last loss; prints rate, time left and peak memory.

    Args:
        total: Number of steps.
        first: Steps that were done before this process started.
        device: Device whose peak memory is reported.
    """
    import torch

    from calibration.run.memory import peak_memory
    from calibration.run.options import Progress as Training

    show, start = plain_progress(), time.monotonic()

    def step_done(done: int, loss: float) -> None:
        rate = (done - first) / max(time.monotonic() - start, 1e-9)
        left = (total - done) / rate
        memory = peak_memory(torch.device(device))
        show(Training(stage="train", step=done, total=total, loss=loss, rate=rate, eta_seconds=left, memory_bytes=memory))

    return step_done

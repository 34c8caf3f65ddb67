"""What the commands print, and how: figures and files to stdout, progress to stderr, one line for an error."""

from __future__ import annotations

import contextlib
import json
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

PLAIN_LINE_SECONDS = 10.0  # between two lines of progress where stderr is no terminal
WIDE = 160  # columns where stdout is no terminal: a log is not folded at 80

Row = Mapping[str, Any]


def out() -> Console:
    """The console of stdout, as it is now: a test may have put another one there."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)


def err() -> Console:
    """The console of stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line on stdout as it stands: square brackets are not taken for markup."""
    out().print(text, markup=False)


def note(text: str) -> None:
    """A line on stderr as it stands: what a long command is doing now."""
    err().print(text, markup=False)


def wrote(path: Path, note: str = "") -> None:
    """Say which file or directory now stands there, how large it is, and what it is."""
    out().print(f"Wrote [bold]{escape(str(path))}[/bold] ({size_words(bytes_of(path))}){': ' + escape(note) if note else ''}")


def print_json(content: Mapping[str, Any]) -> None:
    """`content` as json on stdout, the whole of it."""
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        out().print(f"[dim]{name.ljust(width)}[/dim]  {escape(str(value))}", markup=True)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """A table whose columns are the keys of the first row; numbers stand right."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", title_style="bold")
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row.values()))
    out().print(table)


def cell(value: Any) -> str:
    """A value in a table: four significant digits for a fraction, a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size_words(size: int) -> str:
    """Bytes as people read them: `4.4 MB`."""
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def time_words(seconds: float) -> str:
    """Seconds as people read them: `48 s`, `5 min 12 s`, `2 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files below a directory."""
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else path.stat().st_size


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Any], None]]:
    """A function to hand a `calibration.recipe.Progress` to: a bar on a terminal, a line every ten seconds elsewhere."""
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
    """Loss, rate, time left and memory of a `Progress`; what is not known is left out."""
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
    """A function that prints a line of progress every ten seconds, and at the end of each stage."""
    last = {"stage": "", "time": 0.0}

    def show(now: Any) -> None:
        due = time.monotonic() - float(last["time"]) >= PLAIN_LINE_SECONDS
        if now.stage != last["stage"] or due or now.step == now.total:
            last.update(stage=now.stage, time=time.monotonic())
            sys.stderr.write(f"{now.stage} {now.step}/{now.total} {progress_words(now)}".rstrip() + "\n")
            sys.stderr.flush()

    return show

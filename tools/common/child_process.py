"""Run a command and measure its wall time and the peak memory of the command and its children."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.05  # seconds between two samples of the memory


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a completed command.

    Attributes:
        returncode: Exit status of the command.
        seconds: Wall time.
        peak_bytes: Largest sum of the resident memory of the command and its children, mapped files included; at least the peak that the
            operating system has recorded for any one of them.
        last_line: Last line of its stderr.
    """

    returncode: int
    seconds: float
    peak_bytes: int
    last_line: str


def run_measured(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command and wait for it; its stdout is discarded.

    Args:
        command: Program and arguments.
        cwd: Working directory.
        environment: Environment variables; None inherits those of this process.
    """
    peak = 0
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        root = psutil.Process(child.pid)
        try:
            while child.poll() is None:
                peak = max(peak, _resident(root))
                time.sleep(INTERVAL)
        except BaseException:  # usually Ctrl-C: the command must not keep running
            child.terminate()
            child.wait()
            raise
        seconds = time.perf_counter() - start
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return Measured(returncode=child.returncode, seconds=seconds, peak_bytes=peak, last_line=lines[-1] if lines else "")


def _resident(root: psutil.Process) -> int:
    total, highest = 0, 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
            highest = max(highest, _high_water(process.pid))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return max(total, highest)


def _high_water(pid: int) -> int:
    """Peak memory that the operating system has recorded for a process, exact between our samples; 0 if unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)

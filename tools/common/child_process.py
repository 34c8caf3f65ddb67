"""Run a command that ends with this process, and measure its wall time and the peak memory of the command and its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.05  # seconds between two samples of the memory
GRACE = 30.0  # seconds that an interrupted command has to end

# Run in front of a command on Linux: the kernel sends it SIGTERM when its parent ends, however that ends. The option survives execvp. If the parent
# has ended before, there is nobody left to wait for the command.
TIED = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


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


def tied(command: Sequence[str]) -> list[str]:
    """`command` such that it ends with this process, also if this is killed; on Linux only, elsewhere the command itself.

    Not `preexec_fn`, which is unsafe in a process with threads.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-ISc", TIED, str(os.getpid()), *command]


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt like Ctrl-C, unless they are ignored; only in the main thread, where Python allows handlers."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        for number in previous:
            signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_measured(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command and wait for it; its stdout is discarded. Where this process is interrupted or terminated meanwhile, the command is too.

    Args:
        command: Program and arguments.
        cwd: Working directory.
        environment: Environment variables; None inherits those of this process.
    """
    peak = 0
    with signals_interrupt(), tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(tied(command), cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        root = psutil.Process(child.pid)
        try:
            while child.poll() is None:
                peak = max(peak, _resident(root))
                time.sleep(INTERVAL)
        except BaseException:  # usually Ctrl-C: the command must not keep running
            _end(child)
            raise
        seconds = time.perf_counter() - start
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return Measured(returncode=child.returncode, seconds=seconds, peak_bytes=peak, last_line=lines[-1] if lines else "")


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # or Ctrl-C again
        child.kill()
        child.wait()


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

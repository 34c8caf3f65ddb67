"""Start the processes of one run on this machine, pass signals on to them, and end all of them when one has ended: one exit code and one line of error.

`accelerate launch` and `torchrun` start the same processes, on several machines too; they end with their own report of a failed process. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from edm_deploy_tools.common.child_process import tied
from edm_deploy_tools.common.run_app import ERROR_FILE, INTERRUPTED, PROCESS_LOST, USER_ERROR, CommandFailed

INTERVAL = 0.05  # seconds between two looks at the processes
NOTICE = 30.0  # seconds in which the others end by themselves after one has ended; they write a checkpoint
GRACE = 90.0  # seconds more until they are killed: a process that waits in NCCL sees no signal
FORWARDED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@dataclass(frozen=True)
class _Worker:
    rank: int
    child: subprocess.Popen[bytes]
    errors: IO[bytes] | None  # stderr of another process than 0, whose stderr is that of this process
    message: Path

    def words(self) -> str:
        """The line of error that the process left, or the last line of its stderr."""
        with contextlib.suppress(OSError):
            return self.message.read_text().strip()
        if self.errors is None:
            return ""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def launches(count: int | None) -> bool:
    """Whether this process is to start `count` others; not where it is one of several already."""
    return count is not None and count > 1 and int(os.environ.get("WORLD_SIZE") or 1) == 1


def threads_of_each(count: int) -> int:
    """Threads of each of `count` processes: the cores that this process may use, divided."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // count)


def run_processes(count: int, command: Sequence[str]) -> None:
    """Run `command` in `count` connected processes, and wait for them.

    Process 0 writes to stdout and stderr of this process, the others nowhere. SIGINT, SIGTERM and SIGHUP are passed on to each. Processes end with this one,
    also if this is killed (`tied`).

    Args:
        count: Number of processes; their environment has what `torch.distributed` reads.
        command: Program and arguments; a program of ours writes its line of error to the file that ERROR_FILE names.

    Raises:
        CommandFailed: A process failed, was killed, or was interrupted; with the first reason.
    """
    with tempfile.TemporaryDirectory(prefix="edm-deploy-") as folder, contextlib.ExitStack() as stack:
        environment = _environment(count)
        workers = []
        for rank in range(count):
            errors = None if rank == 0 else stack.enter_context(tempfile.TemporaryFile())
            message = Path(folder) / f"error-{rank}"
            child = subprocess.Popen(
                tied(command),
                env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(message)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # so that Ctrl-C in the terminal reaches each of them once, from here
            )
            workers.append(_Worker(rank, child, errors, message))
        with _forwarding(workers):
            _wait(workers)
        _check(workers)


def _environment(count: int) -> Mapping[str, str]:
    with socket.socket() as listener:  # a port that is free now
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or str(threads_of_each(count))
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return places | {"OMP_NUM_THREADS": threads}


@contextlib.contextmanager
def _forwarding(workers: Sequence[_Worker]) -> Iterator[None]:
    """Signals of this process go to the workers, which decide what to do; a signal that is ignored stays ignored."""

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.child.poll() is None:
                worker.child.send_signal(number)

    main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    previous = {number: signal.getsignal(number) for number in FORWARDED} if main else {}
    previous = {number: handler for number, handler in previous.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in previous:
            signal.signal(number, forward)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[_Worker]) -> None:
    """Until all have ended; where one has failed, the others get a time to notice, then SIGTERM, then SIGKILL."""
    failed_at = None
    terminated = False
    try:
        while running := [worker for worker in workers if worker.child.poll() is None]:
            if failed_at is None and any(worker.child.returncode for worker in workers):
                failed_at = time.monotonic()
            waited = 0.0 if failed_at is None else time.monotonic() - failed_at
            if waited > NOTICE and not terminated:
                terminated = True
                _each(running, signal.SIGTERM)
            if waited > NOTICE + GRACE:
                _each(running, signal.SIGKILL)
            time.sleep(INTERVAL)
    except BaseException:
        _each(workers, signal.SIGKILL)
        raise


def _each(workers: Sequence[_Worker], number: signal.Signals) -> None:
    for worker in workers:
        if worker.child.poll() is None:
            worker.child.send_signal(number)


def _check(workers: Sequence[_Worker]) -> None:
    """Raise the first reason: an error of a process itself, then a process that was killed, then an interruption."""

    def words(code: int) -> str:
        return next((words for worker in workers if worker.child.returncode == code and (words := worker.words())), "")

    for worker in workers:
        code = worker.child.returncode
        if code > 0 and code not in (INTERRUPTED, PROCESS_LOST):
            raise CommandFailed(code, worker.words() or f"Process {worker.rank} of {len(workers)} ended with exit code {code}.")
    for worker in workers:
        if worker.child.returncode < 0:
            name = signal.Signals(-worker.child.returncode).name
            raise CommandFailed(USER_ERROR, f"Process {worker.rank} of {len(workers)} was ended by {name}. {words(PROCESS_LOST)}".strip())
    for code in (INTERRUPTED, PROCESS_LOST):
        if any(worker.child.returncode == code for worker in workers):
            raise CommandFailed(code if code == INTERRUPTED else USER_ERROR, words(code) or "Interrupted.")

"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed) as a flag: a loop finishes its step and writes a checkpoint before it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))  # Windows has no SIGHUP


class InterruptFlag:
    """Context manager that records the first of these signals; a second one has its previous effect.

    A signal that the parent process set to be ignored stays ignored: a shell ignores SIGINT for a background job (`nohup edm-deploy finetune ... &`),
    so that Ctrl-C in the terminal stops the foreground job only, and `nohup` ignores SIGHUP. SIGTERM (`kill`) interrupts such a job. Outside the main thread Python allows no
    signal handlers; nothing is recorded there.

    Attributes:
        is_set: Whether a signal was received.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._previous: dict[signal.Signals, Any] = {}  # handlers; Any as in signal.getsignal

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            # None: a handler that was not installed by Python, which Python cannot restore.
            self._previous = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
            for number in self._previous:
                signal.signal(number, self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            signal.signal(number, self._previous[signal.Signals(number)])
            signal.raise_signal(number)
        self.is_set = True

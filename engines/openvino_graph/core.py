"""The Core of this process."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def core(openvino: Any) -> Any:  # a module; an openvino.Core
    """The one `openvino.Core` of this process, which is never released.

    OpenVINO's CPU plugin sets an alternate signal stack when a Core first uses it, and frees it with the Core. Of two Cores the one that is released last
    restores the other's, which is freed: the next signal, such as Ctrl-C or SIGTERM, ends the process in a segmentation fault (OpenVINO 2026.4.1).
    """
    return openvino.Core()

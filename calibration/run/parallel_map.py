"""Map a function over items in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, in the order of the items; as many threads as torch has, each with one intra-op thread.

    Operators of a few microseconds do not benefit from torch's intra-op threads, and wait for them for milliseconds on a busy machine.

    Args:
        function: Calls torch; must be safe to run in several threads.
        items: Its arguments.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # inherited by threads started from here on
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)

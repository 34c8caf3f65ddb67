"""Many small pieces of work side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_in_a_thread(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in the order of the items; as many at a time as torch has threads, each on one thread of its own.

    Operators of a few microseconds gain nothing from torch's own threads, and wait for them for milliseconds on a busy machine.

    Args:
        work: Calls torch and nothing that may not run twice at once.
        items: What to call it with.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what threads that are started from here on begin with
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)

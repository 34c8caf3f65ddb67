"""Run a function in several connected processes, forked from this one: no import of torch is repeated."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from calibration.run.processes import Processes, joined


def in_processes(count: int, function: Callable[[Processes], Any], folder: Path) -> list[Any]:
    """The results of `function(processes)` in `count` processes on the CPU, each with one thread, by rank; tensors and plain values."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.start_processes(_work, (count, port, function, folder), nprocs=count, start_method="fork")
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(count)]


def _work(rank: int, count: int, port: int, function: Callable[[Processes], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.save(function(joined("cpu")), folder / f"result-{rank}")
    os._exit(0)  # not the exit handlers of the test process, which remove its folders

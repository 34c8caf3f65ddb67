"""The processes of one run: who this is, the share of a batch that it computes, and how results of all are combined. The only file that imports accelerate.

Every process holds the same student, the same optimizer and the same pool of trajectories, draws the same random numbers, and computes a share of each
batch. What is combined are sums, so that the result is that of one process up to the order of summation in float32. What has no share here runs
identically in each process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from calibration.run.parallel_map import parallel_map
from edm_deploy.errors import EdmDeployError, InputError, first_line

BUCKET = 1 << 24  # elements that are combined in one call: 64 MB of float32
PATIENCE = timedelta(hours=2)  # for a process that is silent but not closed, e.g. behind a broken network
WORLD_SIZE = "WORLD_SIZE"  # set by our launcher, by `accelerate launch` and by `torchrun`

Item = TypeVar("Item")
Result = TypeVar("Result")


class ProcessLostError(EdmDeployError):
    """Another process of the run has ended, so that this one cannot go on."""


class Processes:
    """A single process: the base of `JoinedProcesses`, whose collective methods change nothing and cost nothing.

    Attributes:
        rank: Number of this process, 0 to `size - 1`. Process 0 reports progress and writes files.
        size: Number of processes.
        local_size: Number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints, reports and the artifact."""
        return self.rank == 0

    def members(self, total: int) -> slice:
        """The samples of a batch of `total` that this process computes; shares differ by at most one sample."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, of any one floating-point dtype, by its sum over the processes, in place."""

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients of parameters by their means over the processes; one that has none counts as 0, unless none has it."""

    def gather(self, share: Tensor, total: int) -> Tensor:
        """[total, ...] of the shares, [members, ...], of all processes."""
        return share

    def smallest(self, values: Tensor) -> Tensor:
        """Element by element the minimum over the processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return flag

    def first(self, value: Result) -> Result:
        """The value of process 0; it must be picklable."""
        return value

    def each_first(self, values: Iterable[Result]) -> Iterator[Result]:
        """The values that process 0 iterates over, e.g. by its clock; the iterators of the others are not used."""
        yield from values

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of every item, in the order of the items, divided among the processes and their threads; results must be picklable."""
        return parallel_map(function, items)

    def after_first(self, function: Callable[[], Result]) -> Result:
        """`function()`, called in process 0 before it is called in the others: for what writes a file that the others read."""
        return function()

    def close(self) -> None:
        """Leave the others, when nothing is to be combined any more."""

    def check_same(self, digest: Callable[[], str]) -> None:
        """Raises InputError if the processes ended with different results; `digest` is called only if there are several."""


class JoinedProcesses(Processes):
    """One of several processes, connected by gloo on CPUs and by NCCL on GPUs.

    Args:
        cpu: Whether the run computes on the CPU.

    Raises:
        ProcessLostError: The other processes cannot be reached. So do all methods, where another process has ended.
    """

    def __init__(self, *, cpu: bool) -> None:
        from accelerate import PartialState

        threads = torch.get_num_threads()
        try:
            state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl", timeout=PATIENCE)
        except (RuntimeError, ValueError) as err:
            raise ProcessLostError(
                f"The processes of this run cannot reach each other ({first_line(err)}). Run the same command again."
            ) from err
        torch.set_num_threads(threads)  # accelerate sets its own
        self.rank, self.size = state.process_index, state.num_processes
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or state.num_processes)
        self.device = state.device

    def add(self, tensors: Sequence[Tensor]) -> None:
        """As in the base class; in one call for each BUCKET elements."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1).to(self.device) for tensor in bucket])
            _connected(lambda flat=flat: distributed.all_reduce(flat))  # type: ignore[misc]  # bound now
            for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """As in the base class."""
        parameters = list(parameters)
        present = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        self.add([present])
        used = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in used if parameter.grad is not None]
        self.add(gradients)
        for gradient in gradients:
            gradient.div_(self.size)

    def gather(self, share: Tensor, total: int) -> Tensor:
        """As in the base class."""
        whole = share.new_zeros(total, *share.shape[1:])
        whole[self.members(total)] = share
        self.add([whole])
        return whole

    def smallest(self, values: Tensor) -> Tensor:
        """As in the base class."""
        sent = values.to(self.device, copy=True)
        _connected(lambda: distributed.all_reduce(sent, distributed.ReduceOp.MIN))
        return sent.to(values.device)

    def any(self, flag: bool) -> bool:
        """As in the base class."""
        return bool(self.smallest(torch.tensor([0.0 if flag else 1.0])) == 0)

    def first(self, value: Result) -> Result:
        """As in the base class."""
        sent = [value]
        _connected(lambda: distributed.broadcast_object_list(sent, device=self.device))
        return sent[0]

    def each_first(self, values: Iterable[Result]) -> Iterator[Result]:
        """As in the base class."""
        iterator = iter(values)
        while found := self.first([value] if self.writes and (value := next(iterator, END)) is not END else []):
            yield found[0]

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """As in the base class."""
        items = list(items)
        own = parallel_map(function, items[self.rank :: self.size])
        found: list[list[Result]] = [[] for _ in range(self.size)]
        _connected(lambda: distributed.all_gather_object(found, own))
        return [found[index % self.size][index // self.size] for index in range(len(items))]

    def after_first(self, function: Callable[[], Result]) -> Result:
        """As in the base class."""
        if self.writes:
            result = function()
            self.any(False)
            return result
        self.any(False)
        return function()

    def close(self) -> None:
        """As in the base class."""
        distributed.destroy_process_group()

    def check_same(self, digest: Callable[[], str]) -> None:
        """As in the base class."""
        own = digest()
        if self.any(own != self.first(own)):
            raise InputError(
                "The processes of this run ended with different results, expected the same from each: their processors or versions of torch differ. "
                "Run all processes on machines of one kind."
            )


END: Any = object()  # of an iterator
SINGLE = Processes()


def joined(device: str, requested: int | None = None) -> Processes:
    """The processes that this one was started with: by `edm-deploy finetune --processes`, `accelerate launch` or `torchrun`; SINGLE if alone.

    Args:
        device: Device of the run, `cpu` or `cuda`.
        requested: Number of processes that the user asked for; None is any.

    Raises:
        InputError: More processes than GPUs, or not as many as requested.
        ProcessLostError: The others cannot be reached.
    """
    started = int(os.environ.get(WORLD_SIZE) or 1)
    if requested not in (None, started):
        raise InputError(f"--processes is {requested}, but this command was started as one of {started} processes. Leave --processes out.")
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if device != "cpu" and local > torch.cuda.device_count():
        raise InputError(
            f"{local} processes on {torch.cuda.device_count()} GPUs, expected one for each. Set --processes to the number of GPUs."
        )
    return JoinedProcesses(cpu=device == "cpu") if started > 1 else SINGLE


def check_divides(processes: Processes, batch: int, accumulation: int) -> None:
    """Raises InputError if a training batch does not consist of equal parts: the mean over parts would not be the mean over samples."""
    if batch % (processes.size * accumulation):
        parts = " x ".join(
            words
            for count, words in ((processes.size, f"{processes.size} processes"), (accumulation, f"{accumulation} accumulation steps"))
            if count > 1
        )
        most = processes.size * accumulation
        raise InputError(f"batch is {batch}, which {parts} do not divide into equal parts. Set batch to a multiple of {most}.")


def check_shares(processes: Processes, batches: Iterable[int], *, what: str) -> None:
    """Raises InputError if a process has no sample of one of these batches, which the settings `what` decide."""
    if smallest := [batch for batch in batches if batch < processes.size]:
        raise InputError(
            f"{what} leads to a batch of {smallest[0]} samples, fewer than the {processes.size} processes. "
            f"Set {what} to a multiple of {processes.size}, or fewer --processes."
        )


def _connected(call: Callable[[], Result]) -> Result:
    try:
        return call()
    except RuntimeError as err:  # DistBackendError of NCCL and DistNetworkError are such; gloo raises the class itself
        raise ProcessLostError("This run lost a process; nothing was saved. Run the same command again.") from err


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in groups of up to BUCKET elements, or of one larger tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket

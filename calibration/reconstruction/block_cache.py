"""Inputs of a block in the quantized network and its outputs in the float network, cached for many samples, and the block run on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from calibration.data.trajectory_pool import FORWARD_BATCH, Batch
from calibration.reconstruction.blocks import Block, entropy
from calibration.student.fake_quant import dense_format
from calibration.student.module_outputs import input_hooks, module_calls, tensors_of
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.numerics.activation_table import table_rows

CACHE_BYTES = 1 << 30  # maximum size of a block's cached inputs and outputs, unless one forward batch takes more


@dataclass(frozen=True)
class ModelInputs:
    """Graph inputs of many samples at mixed timesteps.

    Attributes:
        values: [N, ...] by name; under classifier-free guidance N counts samples with and without conditioning.
    """

    values: Mapping[str, Tensor]

    @classmethod
    def from_batches(cls, batches: Sequence[Batch]) -> ModelInputs:
        """All samples of several batches of the pool."""
        parts = [batch.inputs for batch in batches]
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def __len__(self) -> int:
        return len(self.values["timestep"])

    def select(self, index: Tensor) -> ModelInputs:
        """The samples at `index`, int64 [M]."""
        return ModelInputs({name: value[index] for name, value in self.values.items()})

    def spread(self, count: int) -> ModelInputs:
        """`count` evenly spaced samples, or all if there are fewer."""
        if count >= len(self):
            return self
        return self.select(torch.arange(count) * len(self) // count)

    def batches(self, batch: int) -> Iterator[dict[str, Tensor]]:
        """Consecutive parts of up to `batch` samples."""
        for first in range(0, len(self), batch):
            yield {name: value[first : first + batch] for name, value in self.values.items()}


@dataclass
class CachedTensor:
    """One leaf of a module's arguments or result: [N, count, ...] for N samples, or a value that all samples share (count 0).

    Feature maps that were channels_last are kept as [N, count, H, W, C].
    """

    value: Any
    count: int = 0
    channels_last: bool = False

    def batch(self, index: Tensor) -> Any:
        """The value for a batch of the samples at `index`, int64 [B], in the layout that it had."""
        if not self.count:
            return self.value
        found = self.value[index].flatten(0, 1)
        return found.permute(0, 3, 1, 2) if self.channels_last else found


@dataclass
class BlockCache:
    """A block with its cached samples.

    Attributes:
        block: The block.
        rows: int64 [N], the table row of each sample; on the CPU or with the samples.
        inputs: For each module the leaves of its arguments in the student.
        specs: Tree structure of each module's arguments.
        targets: Every leaf of every module's result in the teacher.
    """

    block: Block
    rows: Tensor
    inputs: list[list[CachedTensor]] = field(default_factory=list)
    specs: list[TreeSpec] = field(default_factory=list)
    targets: list[CachedTensor] = field(default_factory=list)

    def outputs(self, student: Student, index: Tensor) -> list[Tensor]:
        """Every leaf of every module's result if the student's block runs alone on the samples at `index`, int64 [B]."""
        results: dict[str, list[Tensor]] = {}
        with student.at_rows(self.rows[index.to(self.rows.device)], index.device):
            for name, call, inputs, spec in zip(self.block.modules, self.block.calls, self.inputs, self.specs, strict=True):
                internal = {number: results[source][leaf] for number, (source, leaf) in call.wired.items()}
                leaves = [internal[number] if number in internal else leaf.batch(index) for number, leaf in enumerate(inputs)]
                args, kwargs = tree_unflatten(leaves, spec)
                results[name] = tensors_of(student.model.get_submodule(name)(*args, **kwargs))
        return [leaf for leaves in results.values() for leaf in leaves]

    def reconstruction_error(self, student: Student, index: Tensor, factors: Tensor) -> Tensor:
        """Squared error of the block's results against the teacher's: summed over channels, averaged over the rest, a scalar.

        Source: BRECQ, arXiv 2102.05426, equation 10 without the Fisher information, as in Q-Diffusion's released code.

        Args:
            student: Its block runs alone.
            index: int64 [B], samples of the cache.
            factors: float32 [R], by which the errors of samples at each table row are multiplied. Source: none; 1 in those papers.
        """
        total = torch.zeros((), device=index.device)
        of_samples = factors[self.rows[index.to(self.rows.device)].to(factors.device)].to(index.device)
        for output, target in zip(self.outputs(student, index), self.targets, strict=True):
            error = (output.float() - target.batch(index).float()).square()
            means = error.flatten(1).mean(1) * of_samples.repeat_interleave(len(error) // len(index))
            total = total + means.mean() * error.shape[1 if error.ndim == 4 else -1]
        return total


@torch.no_grad()
def fill_block_cache(block: Block, student: Student, teacher: Teacher, inputs: ModelInputs) -> BlockCache:
    """Run student and teacher up to the end of a block, and cache the block's inputs in the student and its results in the teacher.

    Args:
        block: The block.
        student: Quantized as far as it is; arguments that an earlier module of the block computes are not cached.
        teacher: Float network.
        inputs: As many evenly spaced samples of these as fit into CACHE_BYTES are used.
    """
    inputs = inputs.spread(max(FORWARD_BATCH, CACHE_BYTES // (4 * block.elements)))
    cache = BlockCache(block, table_rows(student.row_of_timestep, inputs.values["timestep"]))
    cache.targets = [CachedTensor(None, count) for call in block.calls for count in call.outputs]
    done = 0
    for part in inputs.batches(FORWARD_BATCH):
        calls = module_calls(student, part, block.modules, results=False)
        if not cache.inputs:
            cache.specs = [tree_flatten(arguments)[1] for arguments in calls]
            cache.inputs = [[CachedTensor(None, count) for count in call.batched] for call in block.calls]
        for call, leaves, arguments in zip(block.calls, cache.inputs, calls, strict=True):
            for number, (leaf, value) in enumerate(zip(leaves, tree_leaves(arguments), strict=True)):
                if number not in call.wired:
                    _store(leaf, value, done, len(inputs))
        results = module_calls(teacher, part, block.modules, results=True)
        for leaf, value in zip(cache.targets, [leaf for result in results for leaf in tensors_of(result)], strict=True):
            _store(leaf, value, done, len(inputs))
        done += len(part["timestep"])
    return cache


@torch.no_grad()
def entropies_of(teacher: Teacher, inputs: ModelInputs, sites: Iterable[str]) -> dict[str, float]:
    """Entropy in bits of each site's input in the float network, on one batch of evenly spaced samples."""
    entropies: dict[str, float] = {}

    def measure(name: str) -> Any:
        return lambda _, args: entropies.__setitem__(name, entropy(args[0]))

    with input_hooks((teacher.model.get_submodule(name), measure(name)) for name in sites):
        teacher(inputs.spread(FORWARD_BATCH).values)
    return entropies


def _store(leaf: CachedTensor, value: Any, first: int, samples: int) -> None:
    if not leaf.count:
        leaf.value = value
        return
    if leaf.value is None:
        leaf.channels_last = dense_format(value) is torch.channels_last
    value = (value.permute(0, 2, 3, 1) if leaf.channels_last else value).unflatten(0, (-1, leaf.count))
    if leaf.value is None:
        leaf.value = value.new_empty(samples, *value.shape[1:])
    leaf.value[first : first + len(value)] = value

"""A block alone: what it is fed in the quantized network and what it gives in the float one, kept for many samples, and the block run on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from calibration.data.trajectory_pool import Batch
from calibration.reconstruction.blocks import Block, entropy
from calibration.student.module_outputs import _until_enough, _watched, tensors_of
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.numerics.activation_table import table_rows

CACHE_BYTES = 1 << 30  # at most so much of a block's inputs and outputs is kept, or one pass of them
PASS = 32  # samples of a forward pass that fills the cache


@dataclass(frozen=True)
class ModelInputs:
    """Graph inputs of many samples at mixed timesteps.

    Attributes:
        values: [N, ...] by name; of a model that is guided, with and without its conditioning.
    """

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> ModelInputs:
        """All samples of batches of the pool."""
        parts = [batch.inputs for batch in batches]
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def __len__(self) -> int:
        return len(self.values["timestep"])

    def chosen(self, index: Tensor) -> ModelInputs:
        """Those at `index`, int64 [M]."""
        return ModelInputs({name: value[index] for name, value in self.values.items()})

    def spread(self, count: int) -> ModelInputs:
        """`count` of them, evenly spread, or all where they are fewer."""
        if count >= len(self):
            return self
        return self.chosen(torch.arange(count) * len(self) // count)

    def parts(self, batch: int) -> Iterator[dict[str, Tensor]]:
        """In turn, up to `batch` at a time."""
        for first in range(0, len(self), batch):
            yield {name: value[first : first + batch] for name, value in self.values.items()}


@dataclass
class CachedTensor:
    """One leaf of an argument or of a result: [N, count, ...] of all samples, or what they share."""

    value: Any
    count: int = 0

    def of(self, chosen: Tensor) -> Any:
        """What a batch of the samples at `chosen`, int64 [B], is fed."""
        return self.value[chosen].flatten(0, 1) if self.count else self.value


@dataclass
class BlockCache:
    """A block with its cached samples.

    Attributes:
        block: What is run.
        rows: int64 [N], the table row of each sample; on the CPU or with the samples.
        inputs: Of each module the leaves of its arguments, as the student feeds them.
        specs: How the leaves make arguments.
        targets: Every leaf of every module's result, as the teacher gives them.
    """

    block: Block
    rows: Tensor
    inputs: list[list[CachedTensor]] = field(default_factory=list)
    specs: list[TreeSpec] = field(default_factory=list)
    targets: list[CachedTensor] = field(default_factory=list)

    def outputs(self, student: Student, chosen: Tensor) -> list[Tensor]:
        """Every leaf of every module's result where the student's block runs alone on the samples at `chosen`, int64 [B]."""
        results: dict[str, list[Tensor]] = {}
        with student.at_rows(self.rows[chosen.to(self.rows.device)], chosen.device):
            for name, call, kept, spec in zip(self.block.modules, self.block.calls, self.inputs, self.specs, strict=True):
                made = {index: results[source][at] for index, (source, at) in call.wired.items()}
                leaves = [made[index] if index in made else leaf.of(chosen) for index, leaf in enumerate(kept)]
                args, kwargs = tree_unflatten(leaves, spec)
                results[name] = tensors_of(student.model.get_submodule(name)(*args, **kwargs))
        return [leaf for leaves in results.values() for leaf in leaves]

    def distance(self, student: Student, chosen: Tensor) -> Tensor:
        """Squared error of the block's results against the teacher's: summed over channels, a mean over the rest, a scalar.

        Source: BRECQ, arXiv 2102.05426, equation 10 without the Fisher information, as Q-Diffusion's released code counts it.
        """
        total = torch.zeros((), device=chosen.device)
        for output, target in zip(self.outputs(student, chosen), self.targets, strict=True):
            error = (output.float() - target.of(chosen).float()).square()
            total = total + error.mean() * error.shape[1 if error.ndim == 4 else -1]
        return total


@torch.no_grad()
def fill_block_cache(block: Block, student: Student, teacher: Teacher, inputs: ModelInputs) -> BlockCache:
    """Run student and teacher up to the end of a block, and keep what the one feeds it and the other gets from it.

    Args:
        block: What will be run alone.
        student: Quantized as far as it is; its arguments to the block are kept, but for those that the block makes itself.
        teacher: Its results are kept.
        inputs: As many of these as CACHE_BYTES hold, evenly spread.
    """
    inputs = inputs.spread(max(PASS, CACHE_BYTES // (4 * block.elements)))
    replay = BlockCache(block, table_rows(student.row_of_timestep, inputs.values["timestep"]))
    replay.targets = [CachedTensor(None, count) for call in block.calls for count in call.outputs]
    done = 0
    for part in inputs.parts(PASS):
        with _watched(student.model, block.modules, before=True) as fed:
            _until_enough(student, part)
        if not replay.inputs:
            replay.specs = [tree_flatten(arguments)[1] for arguments in fed]
            replay.inputs = [[CachedTensor(None, count) for count in call.batched] for call in block.calls]
        for call, kept, arguments in zip(block.calls, replay.inputs, fed, strict=True):
            for index, (leaf, value) in enumerate(zip(kept, tree_leaves(arguments), strict=True)):
                if index not in call.wired:
                    _keep(leaf, value, done, len(inputs))
        with _watched(teacher.model, block.modules, before=False) as given:
            _until_enough(teacher, part)
        for leaf, value in zip(replay.targets, [leaf for result in given for leaf in tensors_of(result)], strict=True):
            _keep(leaf, value, done, len(inputs))
        done += len(part["timestep"])
    return replay


@torch.no_grad()
def entropies_of(teacher: Teacher, inputs: ModelInputs, sites: Iterable[str]) -> dict[str, float]:
    """Entropy in bits of each site's input in the float network, on one pass of the samples, evenly spread."""
    found: dict[str, float] = {}

    def look(name: str) -> Any:
        return lambda _, args: found.__setitem__(name, entropy(args[0]))

    handles = [teacher.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in sites]
    try:
        teacher(inputs.spread(PASS).values)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _keep(leaf: CachedTensor, value: Any, first: int, samples: int) -> None:
    if not leaf.count:
        leaf.value = value
        return
    value = value.unflatten(0, (-1, leaf.count))
    if leaf.value is None:
        leaf.value = value.new_empty(samples, *value.shape[1:])
    leaf.value[first : first + len(value)] = value

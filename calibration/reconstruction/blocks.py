"""Which parts of a denoiser are reconstructed together: blocks by the model's own structure, layers, or blocks joined and cut by activation entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from calibration.student.student import Student
from edm_deploy.errors import InputError
from edm_deploy.network.family import Config, Family, meta_inputs
from edm_deploy.network.layer_costs import site_work

Partition = Literal["block", "layer", "entropy"]
BINS = 256  # of the histogram that an entropy is taken of: at most 8 bits


@dataclass(frozen=True)
class Call:
    """How a module is called in a forward pass. Leaves are the tensors and constants of its arguments, in pytree order.

    Attributes:
        batched: For each leaf the entries of its first axis that belong to one sample; 0 where all samples share it, or it is no tensor.
        outputs: Likewise of the result.
        wired: Leaves that are an earlier module's result: leaf -> (module, leaf of its result).
        elements: Numbers that one sample's arguments and results hold.
        macs: Multiply-accumulates of one sample; counted at the sites.
    """

    batched: tuple[int, ...]
    outputs: tuple[int, ...]
    wired: Mapping[int, tuple[str, int]]
    elements: int
    macs: int


@dataclass(frozen=True)
class Block:
    """Modules that are reconstructed together, in the order in which they run; each but the first is fed by one before it.

    Attributes:
        modules: Names in the model.
        calls: How each is called.
        sites: Names of the quantized layers inside.
        macs: Multiply-accumulates of one sample.
    """

    modules: tuple[str, ...]
    calls: tuple[Call, ...]
    sites: tuple[str, ...]
    macs: int

    @property
    def name(self) -> str:
        """Of its modules."""
        return " + ".join(self.modules)

    @property
    def elements(self) -> int:
        """Numbers that one sample's arguments and results hold."""
        return sum(call.elements for call in self.calls)


def check_partition(found: str) -> None:
    """Raises InputError for a partition that is none."""
    if found not in get_args(Partition):
        raise InputError(f"partition is {found!r}; expected one of {', '.join(get_args(Partition))}. Set another partition.")


def blocks_of(student: Student, outline: nn.Module, partition: Partition, entropies: Mapping[str, float] | None = None) -> list[Block]:
    """The blocks of a student in the order in which they run.

    A block is the innermost entry of a module list that holds two sites or more and runs once in a forward pass: residual blocks, transformer
    blocks, attention. Sites outside of such entries are blocks of their own. A layer that runs twice is in no block, unless a block holds both runs.

    Args:
        student: Its sites are what is partitioned.
        outline: The model on the meta device, with the student's module names.
        partition: `layer` takes every site alone; `entropy` starts from `block`.
        entropies: Of each site's input in bits; only `entropy` asks for them.
    """
    calls = traced_calls(student.family, student.config, outline, student.layers)
    inside = {name: tuple(site for site in student.layers if _holds(name, site)) for name in calls}
    whole = () if partition == "layer" else _innermost(outline, inside)
    covered = {site for name in whole for site in inside[name]}
    names = [name for name in calls if name in whole or (name in student.layers and name not in covered)]
    blocks = [_block([name], calls, inside) for name in names]
    if partition != "entropy":
        return blocks
    assert entropies is not None  # asked for by whoever asks for the partition
    return by_entropy(blocks, calls, inside, entropies)


def by_entropy(
    blocks: Sequence[Block], calls: Mapping[str, Call], inside: Mapping[str, tuple[str, ...]], entropies: Mapping[str, float]
) -> list[Block]:
    """Blocks of high entropy joined to the one that feeds them, blocks of low entropy cut into their layers.

    An activation of high entropy keeps much of the rounding error of the layers before it, so these are searched together; where it is low, apart.
    High and low is what lies above the upper and below the lower quartile of the blocks; no more than two are joined, which bounds the search.

    Source: Wang et al., Q-VLM, NeurIPS 2024, arXiv 2410.08119: activation entropy as the proxy of cross-layer dependency. The quarters are ours.

    Args:
        blocks: In the order in which they run, one module each.
        calls: Of all modules.
        inside: Sites of all modules.
        entropies: Of each site's input, in bits.
    """
    means = [sum(entropies[site] for site in block.sites) / len(block.sites) for block in blocks]
    low, high = torch.tensor(means).quantile(torch.tensor([0.25, 0.75])).tolist()
    result: list[Block] = []
    for block, mean in zip(blocks, means, strict=True):
        before = result[-1] if result else None
        feeds = before is not None and any(module in before.modules for module, _ in calls[block.modules[0]].wired.values())
        if before is not None and feeds and mean > high and len(before.modules) == 1:
            result[-1] = _block([*before.modules, *block.modules], calls, inside)
        elif mean < low and len(block.sites) > 1:
            result += [_block([name], calls, inside) for name in calls if name in block.sites]
        else:
            result.append(block)
    return result


def entropy(x: Tensor, bins: int = BINS) -> float:
    """Entropy in bits of the values of `x`, float of any shape, by a histogram of equal bins between the smallest and the largest."""
    values = x.detach().float().flatten()
    low, high = torch.aminmax(values)
    if not bool(high > low):
        return 0.0
    place = ((values - low) * (bins / (high - low))).long().clamp(max=bins - 1)
    share = torch.bincount(place, minlength=bins).double() / len(values)
    return -float(torch.special.xlogy(share, share).sum()) / float(torch.log(torch.tensor(2.0)))


def traced_calls(family: Family, config: Config, outline: nn.Module, sites: Iterable[str]) -> dict[str, Call]:
    """How every module that holds a site is called, in the order in which they begin; those that do not run exactly once are left out.

    Two forward passes on the meta device, of two and of three samples: what grows with the batch belongs to the samples.

    Args:
        family: Of the model.
        config: Likewise.
        outline: The model on the meta device.
        sites: Names of the layers.
    """
    names = [name for name, _ in outline.named_modules() if name and any(_holds(name, site) for site in sites)]
    two, three = (_forward(family, config, outline, names, batch) for batch in (2, 3))
    once = [name for name, seen in three.items() if len(seen) == 1 and len(two[name]) == 1]
    results: list[tuple[Tensor, tuple[str, int]]] = []
    calls = {}
    for name in once:
        (small, small_out), (large, large_out) = two[name][0], three[name][0]
        batched, outputs = _per_sample(small, large), _per_sample(small_out, large_out)
        if not outputs or 0 in outputs:
            continue  # gives something else than tensors of the samples
        wired = {index: source for index, leaf in enumerate(large) for tensor, source in results if tensor is leaf}
        results += [(leaf, (name, index)) for index, leaf in enumerate(large_out)]
        held = [leaf.numel() // 3 for leaf, count in zip([*large, *large_out], [*batched, *outputs], strict=True) if count]
        module = outline.get_submodule(name)
        macs = site_work(module, large[0], large_out[0]).macs // 3 if isinstance(module, nn.Conv2d | nn.Linear) else 0
        calls[name] = Call(batched, outputs, wired, sum(held), macs)
    return calls


def _forward(
    family: Family, config: Config, outline: nn.Module, names: Sequence[str], batch: int
) -> dict[str, list[tuple[list[Any], list[Any]]]]:  # leaves are tensors and whatever else an argument is
    seen: dict[str, list[tuple[list[Any], list[Any]]]] = {}

    def before(name: str) -> Any:
        return lambda module, args, kwargs: seen.setdefault(name, []).append((tree_leaves((args, kwargs)), []))

    def after(name: str) -> Any:
        return lambda module, args, output: seen[name][-1][1].extend(leaf for leaf in tree_leaves(output) if leaf is not None)

    modules = {name: outline.get_submodule(name) for name in names}
    handles = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            family.forward(outline, meta_inputs(family, config, batch))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _per_sample(two: Sequence[Any], three: Sequence[Any]) -> tuple[int, ...]:
    counts = []
    for small, large in zip(two, three, strict=True):
        grows = isinstance(large, Tensor) and large.ndim > 0 and small.shape[0] != large.shape[0]
        counts.append(large.shape[0] // 3 if grows else 0)
    return tuple(counts)


def _innermost(outline: nn.Module, inside: Mapping[str, tuple[str, ...]]) -> set[str]:
    entries = {
        name
        for name in inside
        if len(inside[name]) > 1 and "." in name and isinstance(outline.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    }
    return {name for name in entries if not any(other != name and _holds(name, other) for other in entries)}


def _block(names: Sequence[str], calls: Mapping[str, Call], inside: Mapping[str, tuple[str, ...]]) -> Block:
    sites = tuple(site for name in names for site in inside[name])
    return Block(tuple(names), tuple(_within(calls[name], names) for name in names), sites, sum(calls[site].macs for site in sites))


def _within(call: Call, names: Sequence[str]) -> Call:
    return dataclasses.replace(call, wired={leaf: source for leaf, source in call.wired.items() if source[0] in names})


def _holds(module: str, site: str) -> bool:
    return site == module or site.startswith(f"{module}.")

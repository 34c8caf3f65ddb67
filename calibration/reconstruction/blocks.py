"""Partition of a denoiser for reconstruction: blocks by the model's own structure, single layers, or blocks joined and divided by activation entropy."""

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
from edm_deploy.network.family import Config, Family
from edm_deploy.network.layer_costs import site_work
from edm_deploy.network.meta_model import meta_inputs, meta_model

Partition = Literal["block", "layer", "entropy"]
BINS = 256  # of the histogram of an entropy, which is therefore at most 8 bits


@dataclass(frozen=True)
class Call:
    """How a module is called in a forward pass. Leaves are the tensors and constants of its arguments, in pytree order.

    Attributes:
        batched: For each leaf the entries along its first axis per sample; 0 if all samples share it, or it is not a tensor.
        outputs: The same for the result.
        wired: Leaves that are the result of an earlier module: leaf -> (module, leaf of its result).
        elements: Elements of the arguments and results of one sample.
        macs: Multiply-accumulates of one sample, if the module is a layer.
    """

    batched: tuple[int, ...]
    outputs: tuple[int, ...]
    wired: Mapping[int, tuple[str, int]]
    elements: int
    macs: int


@dataclass(frozen=True)
class Block:
    """Modules that are reconstructed together, in execution order; each but the first receives a result of an earlier one.

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
        """Names of its modules."""
        return " + ".join(self.modules)

    @property
    def elements(self) -> int:
        """Elements of the arguments and results of one sample."""
        return sum(call.elements for call in self.calls)


def check_partition(partition: str) -> None:
    """Raises InputError for an unknown partition."""
    if partition not in get_args(Partition):
        raise InputError(f"partition is {partition!r}; expected one of {', '.join(get_args(Partition))}. Set another partition.")


def blocks_of(student: Student, partition: Partition, entropies: Mapping[str, float] | None = None) -> list[Block]:
    """The blocks of a student in execution order.

    Args:
        student: Its sites are partitioned.
        partition: `layer` is every site by itself; `entropy` starts from `block`.
        entropies: Entropy of each site's input in bits; used by `entropy` only.
    """
    # Without rotations: a student's layer is called with the tensor that it rotates itself.
    skeleton = meta_model(student.family, student.config, dataclasses.replace(student.structure, rotated={}))
    calls = traced_calls(student.family, student.config, skeleton, student.layers)
    inside = {name: tuple(site for site in student.layers if _holds(name, site)) for name in calls}
    whole = () if partition == "layer" else _innermost(skeleton, inside)
    covered = {site for name in whole for site in inside[name]}
    names = [name for name in calls if name in whole or (name in student.layers and name not in covered)]
    blocks = [_block([name], calls, inside) for name in names]
    if partition != "entropy":
        return blocks
    assert entropies is not None  # the caller measures them for this partition
    return by_entropy(blocks, calls, inside, entropies)


def by_entropy(
    blocks: Sequence[Block], calls: Mapping[str, Call], inside: Mapping[str, tuple[str, ...]], entropies: Mapping[str, float]
) -> list[Block]:
    """Join blocks of high entropy to the block that they receive their input from, and divide blocks of low entropy into layers.

    An activation of high entropy retains much of the rounding error of the layers before it, so these are optimized jointly; where it is low,
    separately. High and low are above the upper and below the lower quartile of the blocks; at most two are joined, which bounds the search.

    Source: Wang et al., Q-VLM, NeurIPS 2024, arXiv 2410.08119: activation entropy as the proxy of cross-layer dependency. The quartiles are ours.

    Args:
        blocks: In execution order, one module each.
        calls: Calls of all modules.
        inside: Sites of all modules.
        entropies: Entropy of each site's input, in bits.
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
    """Entropy in bits of the values of `x`, float of any shape, from a histogram of equal bins between minimum and maximum."""
    values = x.detach().float().flatten()
    low, high = torch.aminmax(values)
    if not bool(high > low):
        return 0.0
    place = ((values - low) * (bins / (high - low))).long().clamp(max=bins - 1)
    share = torch.bincount(place, minlength=bins).double() / len(values)
    return -float(torch.special.xlogy(share, share).sum()) / float(torch.log(torch.tensor(2.0)))


def traced_calls(family: Family, config: Config, skeleton: nn.Module, sites: Iterable[str]) -> dict[str, Call]:
    """How every module that contains a site is called, in execution order; modules that do not run exactly once are left out.

    Two forward passes on the meta device, of two and of three samples: axes that grow with the batch belong to the samples.

    Args:
        family: Family of the model.
        config: Its configuration.
        skeleton: The model on the meta device.
        sites: Names of the layers.
    """
    names = [name for name, _ in skeleton.named_modules() if name and any(_holds(name, site) for site in sites)]
    two, three = (_forward(family, config, skeleton, names, batch) for batch in (2, 3))
    once = [name for name, captured in three.items() if len(captured) == 1 and len(two[name]) == 1]
    results: list[tuple[Tensor, tuple[str, int]]] = []
    calls = {}
    for name in once:
        (small, small_out), (large, large_out) = two[name][0], three[name][0]
        batched, outputs = _per_sample(small, large), _per_sample(small_out, large_out)
        if not outputs or 0 in outputs:
            continue  # the result is not made of tensors of the samples
        wired = {index: source for index, leaf in enumerate(large) for tensor, source in results if tensor is leaf}
        results += [(leaf, (name, index)) for index, leaf in enumerate(large_out)]
        elements = [leaf.numel() // 3 for leaf, count in zip([*large, *large_out], [*batched, *outputs], strict=True) if count]
        module = skeleton.get_submodule(name)
        macs = site_work(module, large[0], large_out[0]).macs // 3 if isinstance(module, nn.Conv2d | nn.Linear) else 0
        calls[name] = Call(batched, outputs, wired, sum(elements), macs)
    return calls


def _forward(
    family: Family, config: Config, skeleton: nn.Module, names: Sequence[str], batch: int
) -> dict[str, list[tuple[list[Any], list[Any]]]]:  # Any: leaves are tensors and other arguments
    captured: dict[str, list[tuple[list[Any], list[Any]]]] = {}

    def before(name: str) -> Any:
        return lambda module, args, kwargs: captured.setdefault(name, []).append((tree_leaves((args, kwargs)), []))

    def after(name: str) -> Any:
        return lambda module, args, output: captured[name][-1][1].extend(leaf for leaf in tree_leaves(output) if leaf is not None)

    modules = {name: skeleton.get_submodule(name) for name in names}
    handles = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            family.forward(skeleton, meta_inputs(family, config, batch))
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _per_sample(two: Sequence[Any], three: Sequence[Any]) -> tuple[int, ...]:
    counts = []
    for small, large in zip(two, three, strict=True):
        grows = isinstance(large, Tensor) and large.ndim > 0 and small.shape[0] != large.shape[0]
        counts.append(large.shape[0] // 3 if grows else 0)
    return tuple(counts)


def _innermost(skeleton: nn.Module, inside: Mapping[str, tuple[str, ...]]) -> set[str]:
    entries = {
        name
        for name in inside
        if len(inside[name]) > 1 and "." in name and isinstance(skeleton.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    }
    return {name for name in entries if not any(other != name and _holds(name, other) for other in entries)}


def _block(names: Sequence[str], calls: Mapping[str, Call], inside: Mapping[str, tuple[str, ...]]) -> Block:
    sites = tuple(site for name in names for site in inside[name])
    return Block(tuple(names), tuple(_within(calls[name], names) for name in names), sites, sum(calls[site].macs for site in sites))


def _within(call: Call, names: Sequence[str]) -> Call:
    return dataclasses.replace(call, wired={leaf: source for leaf, source in call.wired.items() if source[0] in names})


def _holds(module: str, site: str) -> bool:
    return site == module or site.startswith(f"{module}.")

"""Cost of a denoiser from shapes alone: sizes and multiply-accumulates of every layer, and multiply-accumulates outside the layers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edm_deploy.network.family import Config, Family
from edm_deploy.network.low_rank_branch import in_branch
from edm_deploy.network.meta_model import meta_inputs, meta_model
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite


@dataclass(frozen=True, kw_only=True)
class SiteWork:
    """Sizes of one Conv2d or Linear, for one sample at the model's sample size.

    Attributes:
        channels: Input channels of one filter.
        taps: Filter positions, 9 for 3x3; 1 for a Linear.
        outputs: Output channels.
        inputs_at: Positions of the input: pixels or tokens.
        outputs_at: Positions of the output.
    """

    channels: int
    taps: int
    outputs: int
    inputs_at: int
    outputs_at: int

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.channels * self.taps * self.outputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return self.weights * self.outputs_at


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """Cost of one forward pass of one sample at the model's sample size.

    Attributes:
        sites: By layer name, in model order. Positions of a layer that is used twice count twice.
        shared_input: For each site the first site that reads the same tensor: itself, or the sibling whose quantized input it can share.
        other_macs: Multiply-accumulates outside the sites, mostly attention's two matmuls, and the rotations.
        parameters: Number of parameters of the whole model.
        activation_bytes: Peak memory of the activations in float32. The attention matrix is never stored as a whole.
        branches: Layers of float branches, by name. They are no sites.
    """

    sites: Mapping[str, SiteWork]
    shared_input: Mapping[str, str]
    other_macs: int
    parameters: int
    activation_bytes: int
    branches: Mapping[str, SiteWork] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole model."""
        return sum(layer.macs for layer in (*self.sites.values(), *self.branches.values())) + self.other_macs


def model_work(family: Family, config: Config, structure: NetworkRewrite = PUBLISHED) -> ModelWork:
    """Run the model once on the meta device, without memory or arithmetic, and record the shapes at each layer.

    Args:
        family: The model family.
        config: Config of the model.
        structure: Rewrites of the network. Pre-scales are left out, so that q, k and v still read one tensor; the cost of a Mul is negligible. Layers whose
            inputs are rotated differently share none.

    Raises:
        UnsupportedError: The family cannot build this config.
    """
    model = meta_model(family, config, replace(structure, pre_scaled=(), rotated={}))
    uses: dict[str, list[SiteWork]] = {}
    inputs_of: list[tuple[Hashable, str]] = []
    counter, attention, live = FlopCounterMode(display=False), _Attention(), _LiveBytes()

    def record(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        uses.setdefault(name, []).append(site_work(layer, x, y))
        inputs_of.append(((live.identity(x), structure.rotated.get(name)), name))

    branches = {name: layer for name, layer in model.named_modules() if in_branch(name)}
    for name, layer in (family.sites(model) | branches).items():
        layer.register_forward_hook(lambda module, args, y, name=name: record(name, module, args[0], y))
    inputs = meta_inputs(family, config)
    for declared in family.inputs(config)[2:]:  # else each view of the conditioning would count as a new value
        live.hold(inputs[declared.name])
    with counter, live, attention, torch.no_grad():
        family.forward(model, inputs)
    sites = {name: _sum(uses[name]) for name in family.sites(model) if name in uses}
    beside = {name: _sum(uses[name]) for name in branches if name in uses}
    layer_macs = sum(layer.macs for layer in (*sites.values(), *beside.values()))
    shared = _first_readers([(value, name) for value, name in inputs_of if name in sites])
    rotations = sum(
        sites[name].inputs_at * sites[name].channels * block for name, block in structure.rotated.items() if shared.get(name) == name
    )
    return ModelWork(
        sites=sites,
        shared_input=shared,
        other_macs=rotations + attention.macs + max(0, counter.get_total_flops() // 2 - layer_macs),
        parameters=sum(value.numel() for value in model.parameters()),
        activation_bytes=live.most,
        branches=beside,
    )


class _Attention(TorchFunctionMode):
    """Count attention's two matmuls and return a tensor of the right shape; on the meta device torch would materialize the attention matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        queries, width = query.numel() // query.shape[-1], query.shape[-1] + value.shape[-1]
        self.macs += queries * key.shape[-2] * width
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """Peak number of bytes of live tensors, by the lifetime of each operator's result. Views of one storage count once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.count = 0
        self.holders: Counter[int] = Counter()
        self.serials: dict[int, int] = {}

    def identity(self, tensor: Tensor) -> Hashable:
        """A key that is unique to a value within the forward pass, even where memory is reused."""
        key = tensor.untyped_storage()._cdata
        return self.serials.get(key, -key), tensor.shape, tensor.stride(), tensor.storage_offset()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return out

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.holders[key]:
            self.now += size
            self.serials[key] = self.count = self.count + 1
        self.holders[key] += 1
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.now -= 0 if self.holders[key] else size


def site_work(layer: Any, x: Tensor, y: Tensor) -> SiteWork:
    """The cost of a Conv2d or Linear for input `x` and output `y`; positions count all samples of the batch."""
    if isinstance(layer, nn.Conv2d):
        outputs, channels, *window = layer.weight.shape
        return SiteWork(
            channels=channels,
            taps=window[0] * window[1],
            outputs=outputs,
            inputs_at=x.numel() // x.shape[1],
            outputs_at=y.numel() // y.shape[1],
        )
    positions = x.numel() // x.shape[-1]
    return SiteWork(channels=x.shape[-1], taps=1, outputs=y.shape[-1], inputs_at=positions, outputs_at=positions)


def _first_readers(inputs_of: list[tuple[Hashable, str]]) -> dict[str, str]:
    first: dict[Hashable, str] = {}
    readers: dict[str, str] = {}
    for value, name in inputs_of:
        readers.setdefault(name, first.setdefault(value, name))
    return readers


def _sum(uses: list[SiteWork]) -> SiteWork:
    first = uses[0]
    return SiteWork(
        channels=first.channels,
        taps=first.taps,
        outputs=first.outputs,
        inputs_at=sum(use.inputs_at for use in uses),
        outputs_at=sum(use.outputs_at for use in uses),
    )

"""A layer with a float low-rank branch on the same input, `y = base(x) + up(down(x))`: only `base` is quantized.

Source: Li et al., SVDQuant, ICLR 2025, arXiv 2411.05007, equation 4.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from edm_deploy.network.layer_like import layer_like

BASE, BRANCH = "base", "branch"
_BRANCH_LAYER = re.compile(rf"\.{BRANCH}\.(down|up)$")


class LowRankBranch(nn.Module):
    """Two layers without bias, `up(down(x))`: of a Linear two Linears, of a convolution one with its filter and `rank` outputs, then a 1x1 one.

    Both are zero initially.

    Args:
        layer: The layer whose input and output the branch shares.
        rank: Outputs of `down`.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = layer_like(layer, layer.weight.shape[1], rank, bias=False)
        outputs = len(layer.weight)
        self.up: nn.Conv2d | nn.Linear
        with torch.device("meta"):
            self.up = nn.Linear(rank, outputs, bias=False) if isinstance(layer, nn.Linear) else nn.Conv2d(rank, outputs, 1, bias=False)
        for part in (self.down, self.up):
            zeros = torch.zeros(part.weight.shape, device=layer.weight.device)
            part.weight = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)

    @property
    def rank(self) -> int:
        """Outputs of `down`."""
        return len(self.down.weight)

    def set_weights(self, down: Tensor, up: Tensor) -> None:
        """Replace both weights by new parameters.

        Args:
            down: float [rank, Cin * kernel].
            up: float [Cout, rank].
        """
        for part, weight in ((self.down, down), (self.up, up)):
            value = half_values(weight).reshape(part.weight.shape).to(part.weight.device)
            part.weight = nn.Parameter(value, requires_grad=part.weight.requires_grad)

    def start(self, generator: torch.Generator) -> None:
        """Start training from 0: `down` uniform in +-1/sqrt(fan in), `up` zero. Source: LoRA, arXiv 2106.09685, with its released initialization."""
        fan_in = self.down.weight[0].numel()
        down = (torch.rand(self.rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)
        self.set_weights(down, torch.zeros(len(self.up.weight), self.rank))

    def product(self) -> Tensor:
        """The weight of one layer that computes the same: float32 [Cout, Cin * kernel]."""
        return self.up.weight.float().flatten(1) @ self.down.weight.float().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """The branch's share of the layer's output."""
        result: Tensor = self.up(self.down(x))
        return result


class BranchedLayer(nn.Module):
    """A Conv2d or Linear with a float branch. Whatever multiplies or rounds the input of `base` leaves that of `branch` as it is.

    Args:
        layer: The published layer, ungrouped, which becomes `base`.
        rank: Rank of the branch.

    Attributes:
        base: The layer.
        branch: Its branch; None computes the layer alone, as in a float model, whose branches are 0.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        super().__init__()
        self.base: nn.Module = layer
        self.branch: LowRankBranch | None = LowRankBranch(layer, rank)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Output of the layer and of its branch."""
        y: Tensor = self.base(x)
        return y if self.branch is None else y + self.branch(x)


def largest_rank(layer: nn.Conv2d | nn.Linear) -> int:
    """The rank of the layer's weight as a matrix [Cout, Cin * kernel], which a branch cannot use more than."""
    return min(len(layer.weight), layer.weight[0].numel())


def unbranchable(layer: nn.Conv2d | nn.Linear, rank: int) -> str | None:
    """The reason why a layer cannot have a branch of this rank, as a phrase, or None."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return "it is a grouped convolution"
    if not 1 <= rank <= largest_rank(layer):
        return f"expected 1 to {largest_rank(layer)}, the rank of its weight"
    return None


def in_branch(name: str) -> bool:
    """Whether a layer belongs to a branch, by its name."""
    return _BRANCH_LAYER.search(name) is not None


def half_values(weight: Tensor) -> Tensor:
    """The nearest values that float16 represents, as float32: what artifacts store in two bytes and float16 engines compute with."""
    largest = torch.finfo(torch.float16).max
    return weight.detach().float().clamp(-largest, largest).half().float()

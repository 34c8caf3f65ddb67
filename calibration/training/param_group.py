"""A group of parameters with one learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with a common learning rate; a rate of 0 keeps them fixed."""

    parameters: Sequence[nn.Parameter]
    rate: float

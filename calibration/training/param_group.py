"""A group of parameters with one learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a rate; a rate of 0 leaves them as they are."""

    parameters: Sequence[nn.Parameter]
    rate: float

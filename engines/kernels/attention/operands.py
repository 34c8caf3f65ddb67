"""The operands of attention and their checks. Kernels read raw pointers, so everything they rely on is checked here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from engines.kernels.checks import FLOATS, check_size

OP = "attention_s8"
OCTET = 8  # elements of 16 bytes, which the kernels read at a time
WIDEST = 160  # elements of a head
LOG2_E = 1.4426950408889634
LARGEST_CODE = 127.0
LEAST_MAGNITUDE = 1e-30  # of a token's largest element: below it the token is 0
MOST_BLOCKS = 65535  # of a grid along y and z


def supports(width: int) -> bool:
    """Whether the kernels have heads of `width` elements."""
    return 0 < width <= WIDEST and width % OCTET == 0


@dataclass(frozen=True)
class AttentionOperands:
    """Operands of attention without a mask.

    Attributes:
        query: float16 or bfloat16 [B, H, Lq, D].
        key: Likewise [B, H, Lk, D].
        value: Likewise [B, H, Lk, D].
        scale: Factor of the scores; None for D ** -0.5.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None

    @property
    def factor(self) -> float:
        """Factor of the scores where powers are of 2 instead of e."""
        return (self.query.shape[-1] ** -0.5 if self.scale is None else self.scale) * LOG2_E

    def check(self) -> None:
        """Raises InputError for operands that do not fit together, UnsupportedError for sizes that no kernel has."""
        query, key, value = self.query, self.key, self.value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dtype not in FLOATS or x.dtype != query.dtype or x.device != query.device:
                raise InputError(
                    f"{OP}: {name} is {_words(x.dtype)} on {x.device}; expected all of float16, or all of bfloat16, on {query.device}."
                )
            if x.ndim != 4 or x.numel() == 0:
                raise InputError(f"{OP}: {name} has shape {list(x.shape)}; expected [B, H, tokens, D] with at least one element.")
        if key.shape != value.shape or key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
            raise InputError(
                f"{OP}: query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}; expected [B, H, Lq, D] and [B, H, Lk, D] twice."
            )
        if not supports(query.shape[3]):
            raise UnsupportedError(
                f"{OP}: heads of {query.shape[3]} elements; the kernels have multiples of {OCTET} up to {WIDEST}. Keep this attention in floating point."
            )
        if max(query.shape[:2]) > MOST_BLOCKS:
            raise UnsupportedError(f"{OP}: {list(query.shape)} has more than {MOST_BLOCKS} samples or heads. Use a smaller batch.")

    def check_sizes(self) -> None:
        """Raises UnsupportedError where the kernels could not count the elements."""
        check_size(OP, query=self.query.shape, key=self.key.shape)


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

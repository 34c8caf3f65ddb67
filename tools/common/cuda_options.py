"""Command-line options of the cuda backend, and their values."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Int4Sites(StrEnum):
    """Sites that the cuda backend computes in INT4: all whose codes fit, or those that are expected to be faster than in INT8."""

    FITS = "fits"
    FASTER = "faster"


class RestOfGraph(StrEnum):
    """How the cuda backend runs what is between quantized layers."""

    EAGER = "eager"
    INDUCTOR = "inductor"


class AttentionProducts(StrEnum):
    """How the cuda backend computes the product of queries and keys."""

    FLOAT = "float"
    INT8 = "int8"


Int4Where = Annotated[
    Int4Sites | None,
    typer.Option(
        "--int4-where",
        help="For cuda: fits computes each site whose codes fit 4 bits in INT4; faster uses INT8 where INT4 is not expected to be faster on --gpu.",
    ),
]
Rest = Annotated[
    RestOfGraph | None,
    typer.Option(
        "--rest",
        help="For cuda: inductor compiles what is between quantized layers by torch.compile, when the engine is opened. Default: eager.",
    ),
]
Attention = Annotated[
    AttentionProducts | None,
    typer.Option(
        "--attention",
        help="For cuda: int8 rounds queries and keys of attention to 8 bits at run time, where there is no mask. Default: float.",
    ),
]

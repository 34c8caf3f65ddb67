"""Placement of layers: which are quantized, which stay at 8 bits or in floating point, and which part of the model each belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Placement = Literal["quantize", "w8a8", "float"]
LayerGroup = Literal["time_embedding", "skip", "feed_forward", "attention", "convolution", "other"]
LAYER_GROUPS: tuple[LayerGroup, ...] = get_args(LayerGroup)
# Names that diffusers gives the layers of each part, in every family; the first pattern found in a site's name decides. The linears of an
# adaptive norm read the embedded timestep alone.
GROUP_PATTERNS: tuple[tuple[LayerGroup, str], ...] = (
    ("time_embedding", r"time_emb|timestep_embedder|time_text_embed|add_embedding|class_embedding|adaln|norm\w*\.linear"),
    ("skip", r"conv_shortcut"),
    ("feed_forward", r"\bff(_context)?\.|proj_mlp|single_transformer_blocks\.\d+\.proj_out"),
    ("attention", r"\battn\d*\.|\battentions\."),
    ("convolution", r"conv|proj$"),
)


@dataclass(frozen=True)
class PlacementRule:
    """Layer-name pattern and its quantization placement.

    Attributes:
        pattern: Regular expression, searched in the name of a layer.
        placement: Placement of the layers that match.
        reason: The reason, as a phrase; `inspect` and docs/families.md print it.
    """

    pattern: str
    placement: Placement
    reason: str


QUANTIZED = PlacementRule("", "quantize", "the recipe's bits")
BRANCHES = PlacementRule(r"\.branch\.(down|up)$", "float", "the low-rank branch of a quantized layer, which adds what few bits lose")


def rule_for(layer: str, rules: Sequence[PlacementRule]) -> PlacementRule:
    """The first rule whose pattern is found in the name of a layer; `QUANTIZED` where none is."""
    return next((rule for rule in rules if re.search(rule.pattern, layer)), QUANTIZED)


def group_of(layer: str) -> LayerGroup:
    """The part of the model that a layer belongs to, by its name."""
    return next((group for group, pattern in GROUP_PATTERNS if re.search(pattern, layer)), "other")

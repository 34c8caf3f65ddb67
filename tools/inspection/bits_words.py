"""Bits that differ by layer, by output channel or by timestep, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.relaxed_timesteps import FOLDER
from edm_deploy.artifact.timestep_routing import Intervals, describe_intervals
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.runtime.manifest import Manifest


def channel_bits_words(sites: Sequence[QuantizedLayer]) -> str:
    """Number of output channels by weight bits, of the sites where the bits differ by channel."""
    mixed = [site.channel_bits for site in sites if site.channel_bits is not None]
    if not mixed:
        return "none"
    bits = torch.cat(mixed)
    widths, counts = bits.unique(return_counts=True)  # type: ignore[no-untyped-call]  # untyped in torch
    histogram = ", ".join(f"{count} of {width}" for width, count in zip(widths.tolist(), counts.tolist(), strict=True))
    return f"{len(mixed)} sites; channels: {histogram} bits, {float(bits.float().mean()):.2f} on average"


def allocation_words(artifact: Artifact) -> str:
    """The sites that a pass gave other bits than the recipe, and their bits now."""
    names = [name for name in artifact.provenance.get("allocation", {}) if name in artifact.sites]
    if not names:
        return "none: every site has the bits of the recipe or those that the family keeps"
    schemes = Counter(artifact.sites[name].scheme for name in names)
    counts = ", ".join(f"{count} at {scheme}" for scheme, count in schemes.most_common())
    return f"{len(names)} of {len(artifact.sites)} sites with more bits than the recipe's, {counts}: {', '.join(names)}"


def relaxed_words(spans: Intervals, bits: int | None) -> str:
    """Timesteps that the second graph computes, and the bits of its inputs: 8, or 16 for floating point."""
    if not spans:
        return "none"
    inputs = "activations in floating point" if bits == WEIGHT_ONLY_BITS else f"inputs of {bits} bits"
    return f"{describe_intervals(spans)}: {inputs}, in a second graph of the same weights"


def relaxed_bits(path: Path, manifest: Manifest, kind: Literal["onnx", "engine"]) -> int | None:
    """Bits of the inputs of the second graph or engine; 16 where they are in floating point, None where there is none."""
    if not manifest.relaxed:
        return None
    schemes = {site.scheme for site in Manifest.read(path / FOLDER, kind=kind).sites.values()}
    return max(int(scheme.partition("A")[2]) for scheme in schemes)

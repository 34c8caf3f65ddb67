"""The two graphs of an artifact that has relaxed timesteps, at which inputs have more bits than at the others."""

from __future__ import annotations

from dataclasses import replace

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.numerics.activation_table import ActivationTable

FOLDER = "relaxed"  # subdirectory of the second graph or engine


def quantized_graph(artifact: Artifact) -> Artifact:
    """The artifact of the first graph: without routing and correction, which the runtime performs, and without the second graph's tables."""
    sites = {name: replace(site, relaxed_activation=None) for name, site in artifact.sites.items()}
    return replace(artifact, relaxed=None, correction=None, sites=sites)


def relaxed_graph(artifact: Artifact) -> Artifact:
    """The artifact of the second graph: the same weight codes, with inputs of 8 bits or, where the artifact has no tables for them, in floating point."""
    integer = artifact.relaxed_bits == 8
    sites = {name: replace(site, activation=_relaxed_table(site) if integer else None) for name, site in artifact.sites.items()}
    return quantized_graph(replace(artifact, sites=sites, pipeline={}))


def _relaxed_table(site: QuantizedLayer) -> ActivationTable | None:
    return site.activation if site.relaxed_activation is None else site.relaxed_activation

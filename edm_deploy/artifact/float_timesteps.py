"""The two graphs of an artifact that has timesteps at which activations stay in floating point."""

from __future__ import annotations

from dataclasses import replace

from edm_deploy.artifact.artifact import Artifact

FOLDER = "relaxed"  # subdirectory of the second graph or engine


def quantized_graph(artifact: Artifact) -> Artifact:
    """The artifact of the first graph: without routing and correction, which the runtime performs."""
    return replace(artifact, relaxed=None, correction=None)


def float_activation_graph(artifact: Artifact) -> Artifact:
    """The artifact of the second graph: the same weights, every input in floating point."""
    sites = {name: replace(site, activation=None) for name, site in artifact.sites.items()}
    return replace(quantized_graph(artifact), sites=sites, pipeline={})

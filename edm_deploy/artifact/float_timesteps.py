"""Timesteps at which activations stay in floating point: the second graph with the same weights, and the way of each sample to its graph."""

from __future__ import annotations

from dataclasses import replace

from edm_deploy.artifact.artifact import Artifact

FOLDER = "relaxed"  # in the directory of a graph or an engine: the second one


def quantized_graph(artifact: Artifact) -> Artifact:
    """What the first graph computes: the artifact without what the runtime does around it."""
    return replace(artifact, relaxed=None, correction=None)


def float_activation_graph(artifact: Artifact) -> Artifact:
    """What the second graph computes: the same weights, every input in floating point."""
    sites = {name: replace(site, activation=None) for name, site in artifact.sites.items()}
    return replace(quantized_graph(artifact), sites=sites, pipeline={})

"""The options for LoRA of several commands: `FILE:WEIGHT`, rank slots, and LoRAs that are added for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from edm_deploy.adapters.fuse import with_loras
from edm_deploy.adapters.lora import Lora
from edm_deploy.adapters.read_lora import LoraTarget, read_lora
from edm_deploy.adapters.site_weights import adapters_of
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.network.adapter_inputs import MAX_RANK, AdapterInputs
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.lora_methods import LARGEST_WEIGHT
from edm_deploy.storage.leftovers import scratch_directory
from edm_deploy_tools.common import console
from engines import backend_named


def file_and_weight(text: str) -> tuple[Path, float]:
    """A file and its weight from `FILE:WEIGHT` or `FILE`, whose weight is 1.

    Raises:
        InputError: The weight is out of range.
    """
    name, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        name, weight = text, 1.0
    if not name:
        raise InputError(f"--lora {text}: expected FILE or FILE:WEIGHT, for example style.safetensors:0.8.")
    if not abs(weight) <= LARGEST_WEIGHT:
        raise InputError(f"--lora {text}: weight {weight:g}, expected a finite number of at most {LARGEST_WEIGHT:g}.")
    return Path(name), weight


def branches_for(artifact: Artifact, rank: int | None, pattern: str | None) -> AdapterInputs | None:
    """The adapter branches of `--lora-rank` and `--lora-layers`; None where no rank is given.

    Raises:
        InputError: A pattern without a rank, or as `adapters_of`.
    """
    if rank is None:
        if pattern is not None:
            raise InputError("--lora-layers names the layers of --lora-rank. Add --lora-rank, or leave --lora-layers out.")
        return None
    return adapters_of(artifact, rank=rank, pattern=pattern)


def fused(artifact: Artifact, given: Sequence[str]) -> Artifact:
    """The artifact with the LoRAs of `--lora` in float branches; prints what a user should know of each.

    Raises:
        ArtifactError, InputError, UnsupportedError: As `read_lora` and `with_loras`.
    """
    if not given:
        return artifact
    loras = read_loras(artifact, [file_and_weight(text) for text in given])
    for lora, _ in loras:
        for note in lora.notes:
            console.say(f"Note: {lora.name}: {note}")
    return with_loras(artifact, loras)


def read_loras(model: Artifact | Source, files: Sequence[tuple[Path, float]]) -> list[tuple[Lora, float]]:
    """Read LoRAs of a model's published network, each with its weight.

    Raises:
        ArtifactError, InputError: A file is damaged, or of another model; see `read_lora`.
    """
    target = LoraTarget(model.family_object, model.config, MAX_RANK)
    return [(read_lora(path, target), weight) for path, weight in files]


@contextlib.contextmanager
def source_with_loras(source: Path, backend: str, given: Sequence[str]) -> Iterator[Path]:
    """The directory that an engine is built from: `source`, or with LoRAs a copy of the artifact that has them.

    Raises:
        UnsupportedError: LoRAs for a backend that builds from a graph.
    """
    if not given:
        yield source
        return
    if backend_named(backend).builds_from != "artifact":
        raise UnsupportedError(f"{backend} builds from a graph, whose weights are fixed. Give --lora to edm-deploy export.")
    with scratch_directory("lora") as scratch:
        yield fused(Artifact.load(source), given).save(Path(scratch) / "artifact")

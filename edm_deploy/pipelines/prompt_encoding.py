"""Encode labels and prompts as conditioning, with the class embedder or the text encoders of a source pipeline."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.network.family import Config, Family
from edm_deploy.pipelines.guidance import Conditioner
from edm_deploy.pipelines.rebuild import text_pipeline, without_loading_messages
from edm_deploy.pipelines.source import Source
from edm_deploy.storage.directories import INDEX_FILE

log = logging.getLogger(__name__)

EMBEDDER_WEIGHTS = Path("class_embedder/diffusion_pytorch_model.safetensors")
LABEL_SCALE = 1.5  # Source: EfficientDM's training on LDM-4, methods of arXiv 2310.03270 and its released code.
PROMPTS_AT_ONCE = 8  # in one call of the text encoders


def conditioner_of(source: Source, *, scale: float | None = None, prompts: Sequence[str] = ()) -> Conditioner:
    """The conditioner of a source: labels of its class embedder, prompts of its text encoders, or random conditioning, which is logged.

    Args:
        source: A source whose directory may hold a class embedder or text encoders; they are loaded, used and freed.
        scale: Guidance scale; None is the usual scale of this model.
        prompts: Prompts, for models that take text.

    Raises:
        ArtifactError: The embedder or a text encoder cannot be read.
        InputError: A prompt is too long, or the model has no guidance.
    """
    family, config, home = source.family_object, source.config, source.directory
    if home is not None and (home / EMBEDDER_WEIGHTS).is_file():
        table = class_table(home / EMBEDDER_WEIGHTS)
        tokens = family.text_inputs[0]
        return Conditioner(
            family,
            config,
            scale=LABEL_SCALE if scale is None else scale,
            encoded={tokens: table[:-1, None]},
            unconditional={tokens: table[-1:, None]},
            origin=f"{len(table) - 1} labels of the class embedder",
        )
    text_inputs = [declared.name for declared in family.inputs(config) if declared.name in family.text_inputs]
    if not text_inputs:
        return Conditioner(family, config, scale=scale)
    encoded = encode(home, family, config, prompts) if home is not None and prompts else None
    if encoded is None:
        log.warning("%s has no text encoders here: random %s replace those of prompts.", source.name, text_inputs[0])
        return Conditioner(family, config, scale=scale)
    conditional, unconditional = encoded
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]
    origin = f"{len(prompts)} prompts, sha256 {digest}"
    return Conditioner(family, config, scale=scale, encoded=conditional, unconditional=unconditional, origin=origin)


@torch.no_grad()
def encode(directory: Path, family: Family, config: Config, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Encode P prompts with the text encoders of a pipeline.

    Returns:
        Graph inputs by name, float32 [P, ...], and those of the empty prompt, [1, ...]; None where the directory holds no text encoders.

    Raises:
        ArtifactError: A text encoder cannot be read.
        InputError: A prompt is longer than the text encoders accept.
    """
    pipeline = text_pipeline(directory)
    if pipeline is None:
        return None
    with without_loading_messages():
        for prompt, count, longest in truncated_prompts(pipeline, prompts):
            raise InputError(f"The prompt {prompt[:40] + '...'!r} has {count} tokens; the text encoder takes {longest}. Shorten it.")
        parts = [
            family.encode_prompts(config, pipeline, prompts[at : at + PROMPTS_AT_ONCE]) for at in range(0, len(prompts), PROMPTS_AT_ONCE)
        ]
    conditional = {name: torch.cat([_plain(part[name]) for part, _ in parts]) for name in parts[0][0]}
    return conditional, {name: _plain(value) for name, value in parts[0][1].items()}


def takes_prompts(source: Source) -> bool:
    """Whether the source directory holds text encoders."""
    index, home = source.pipeline.get(INDEX_FILE, {}), source.directory
    return home is not None and any(name.startswith("text_encoder") and (home / name).is_dir() for name in index)


def check_takes_prompts(source: Source) -> None:
    """Refuse prompts for a source that cannot encode them.

    Raises:
        InputError: The source has no text encoders.
    """
    if not takes_prompts(source):
        raise InputError(f"--prompts: {source.name} is a {source.family} model without text encoders. Leave the prompts out.")


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value.float().contiguous() if value.is_floating_point() else value.contiguous()


def truncated_prompts(pipeline: Any, prompts: Sequence[str]) -> list[tuple[str, int, int]]:
    """The prompts that the text encoders truncate, each with its number of tokens and the largest number.

    Counted by the tokenizer with the largest limit: of several text encoders, the others truncate by design. A T5 tokenizer has no limit; its pipeline
    truncates at the `max_sequence_length` of `encode_prompt`.
    """
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is not None]
    if not tokenizers:
        return []
    tokenizer = max(tokenizers, key=lambda part: int(part.model_max_length))
    parameters = inspect.signature(pipeline.encode_prompt).parameters
    limit = [parameters["max_sequence_length"].default] if "max_sequence_length" in parameters else []
    longest = min([int(tokenizer.model_max_length), *limit])
    counted = [(prompt, len(tokenizer(prompt, truncation=False, verbose=False).input_ids), longest) for prompt in prompts]
    return [entry for entry in counted if entry[1] > longest]


def class_table(path: Path) -> Tensor:
    """A class embedder's table, float32 [classes + 1, width]; the last row is the token for no label.

    Raises:
        ArtifactError: The file holds none.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            table: Tensor = stream.get_tensor("embedding.weight").float()
            return table
    except (safetensors.SafetensorError, ValueError, RuntimeError, OSError) as err:
        raise ArtifactError(f"{path} holds no embedding.weight ({err}). Save the class embedder again.") from err

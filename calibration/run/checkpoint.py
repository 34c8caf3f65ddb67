"""A training run on disk: written whole or not at all, resumed bit for bit, refused where it belongs to another run. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edm_deploy.errors import ArtifactError
from edm_deploy.storage.directories import new_directory, read_json, sha256_of, write_json
from edm_deploy.storage.leftovers import recover

JSON_NAME = "checkpoint.json"
TENSORS_NAME = "checkpoint.safetensors"


def save_checkpoint(directory: Path, *, step: int, identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint in `directory`.

    Args:
        directory: Made where it does not stand yet.
        step: Steps done.
        identity: json; what must be equal for the run to be resumed.
        tensors: The whole state by name.

    Raises:
        ArtifactError: `directory` holds something else, or the disk refuses; the checkpoint before stays.
    """
    with new_directory(directory, marker=JSON_NAME) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary / TENSORS_NAME)
        write_json(temporary / JSON_NAME, {"step": step, "identity": dict(identity), "sha256": sha256_of(temporary / TENSORS_NAME)})


def load_checkpoint(directory: Path, identity: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """Steps done, and the state by name.

    Args:
        directory: Where `save_checkpoint` wrote.
        identity: Of the run that wants to go on.

    Raises:
        ArtifactError: No checkpoint, a damaged one, or one of another run; the message names the first difference.
    """
    recover(directory)
    if not (directory / JSON_NAME).is_file():
        raise ArtifactError(f"{directory} holds no checkpoint to resume. Start without --resume, or check --out.")
    description = read_json(directory / JSON_NAME, what="checkpoint")
    found = description.get("identity")
    if found != json.loads(json.dumps(identity)):
        raise ArtifactError(
            f"{directory} is the checkpoint of another run: {_difference(found, identity)}. Use the settings it was made with, or start without --resume."
        )
    path = directory / TENSORS_NAME
    try:
        if sha256_of(path) != description.get("sha256"):
            raise ArtifactError(f"{path} is damaged: its sha256 is not the one in {JSON_NAME}. Start without --resume.")
        return int(description["step"]), load_file(path)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as err:
        raise ArtifactError(f"{path} cannot be read ({err}). Start without --resume.") from err


def _difference(found: Any, expected: Mapping[str, Any]) -> str:
    # Any: whatever the file holds.
    if not isinstance(found, dict):
        return "it says nothing about its settings"
    flat_found, flat_expected = _flat(found), _flat(expected)
    name = next(key for key in sorted(flat_found | flat_expected) if flat_found.get(key) != flat_expected.get(key))
    return f"{name} is {flat_found.get(name)!r} there and {flat_expected.get(name)!r} here"


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def restore(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter a loaded value in memory of its own, in the layout that it had: until now it may have been the teacher's too."""
    parameter.data = torch.empty_like(parameter).copy_(value)

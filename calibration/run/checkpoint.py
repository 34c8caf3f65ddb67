"""Training checkpoints: written atomically, resumed bit for bit, refused for a different run. JSON and safetensors, no pickle."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration.run.options import Run, RunOptions
from calibration.run.time_budget import Budget
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.storage.directories import read_json, sha256_of, write_json
from edm_deploy.storage.leftovers import recover
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory

JSON_NAME = "checkpoint.json"
TENSORS_NAME = "checkpoint.safetensors"
CHECKPOINT = DirectoryKind("a checkpoint", JSON_NAME, (TENSORS_NAME,))
PARAMETERS, TRAJECTORIES, NOTES, BUDGET = "parameter.", "trajectories.", "note.", "budget"  # prefixes and the name of tensors on disk


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """State of a training run between two steps: everything that determines how it continues.

    Attributes:
        step: Training steps done; in block reconstruction, blocks done.
        parameters: The student's parameters by name.
        trajectories: State of the trajectory pool by name.
        method: Further state of the training method by name, such as the optimizer's. No name has a prefix of the other groups.
        budget: Wall time at this step; None where the run has no budget.
    """

    step: int
    parameters: Mapping[str, Tensor]
    trajectories: Mapping[str, Tensor]
    method: Mapping[str, Tensor]
    budget: Budget | None


class CheckpointTimer:
    """When the next checkpoint of a run is due, by wall time.

    Args:
        run: The first interval is counted from its start.
    """

    def __init__(self, run: Run) -> None:
        self._seconds, self._last = run.options.checkpoint_seconds, run.started

    def is_due(self) -> bool:
        """Whether the interval has passed. If it has, the next one starts now."""
        now = time.perf_counter()
        due = now - self._last >= self._seconds
        self._last = now if due else self._last
        return due


def save_training(run: Run, state: TrainingState, *, position: str, finished: bool) -> None:
    """Replace the checkpoint of a run by `state` and the numbers in its notes. Does nothing if the run has no checkpoint directory, or in a process that does not write.

    Args:
        run: Its identity is saved too.
        state: What determines how the run continues.
        position: How far the run is, for messages: `step 300 of 16000`.
        finished: Whether nothing is left to train.

    Raises:
        ArtifactError: The directory contains other files, or cannot be written; the previous checkpoint is kept.
    """
    if run.options.checkpoint is None or not run.options.processes.writes:
        return
    tensors = add_prefix(PARAMETERS, state.parameters) | add_prefix(TRAJECTORIES, state.trajectories) | dict(state.method)
    # float64 stores a Python float exactly; integers become int64.
    numbers = {name: value for name, value in run.notes.items() if isinstance(value, int | float)}
    notes = {name: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) for name, value in numbers.items()}
    tensors |= add_prefix(NOTES, notes)
    if state.budget is not None:
        tensors[BUDGET] = torch.tensor([state.budget.seconds, state.budget.used()], dtype=torch.float64)
    description = {"step": state.step, "position": position, "finished": finished, "identity": run.identity}
    save_checkpoint(run.options.checkpoint, description=description, tensors=tensors)


def resume_training(run: Run) -> TrainingState | None:
    """State to resume from, or None if the run starts from the beginning. Adds the saved notes to `run.notes`.

    Raises:
        ArtifactError: The checkpoint is missing, damaged or from a different run.
    """
    if not run.options.resume or run.options.checkpoint is None:
        return None
    step, tensors = load_checkpoint(run.options.checkpoint, run.identity)
    run.notes.update({name: value.item() for name, value in strip_prefix(NOTES, tensors).items()})
    budget = None
    if BUDGET in tensors:
        seconds, used = tensors[BUDGET].tolist()
        budget = Budget(seconds, used=used)
    return TrainingState(
        step=step,
        parameters=strip_prefix(PARAMETERS, tensors),
        trajectories=strip_prefix(TRAJECTORIES, tensors),
        method={name: value for name, value in tensors.items() if not name.startswith((PARAMETERS, TRAJECTORIES, NOTES, BUDGET))},
        budget=budget,
    )


def restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Set parameters to loaded values of the same names, in newly allocated memory of the same layout: the old memory may be the teacher's too."""
    for name, parameter in parameters.items():
        parameter.data = torch.empty_like(parameter).copy_(values[name])


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `prefix` before each name."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def holds_checkpoint(directory: Path) -> bool:
    """Whether `directory` has a checkpoint; one that a killed run was replacing is restored first."""
    recover(directory)
    return (directory / JSON_NAME).is_file()


def check_not_overwritten(options: RunOptions, *, finished_too: bool = False) -> None:
    """Refuse a run that starts anew where the checkpoint of an unfinished one is; call it before any work.

    Args:
        options: Of the run to be started.
        finished_too: Whether the checkpoint of a finished training is kept as well: its artifact was not saved.

    Raises:
        InputError: The message states what the checkpoint contains.
        ArtifactError: The directory contains other files.
    """
    directory = options.checkpoint
    if directory is None or options.resume:
        return
    found = holds_checkpoint(directory)
    check_output(directory, kind=CHECKPOINT)
    if not found:
        return
    try:
        description = read_json(directory / JSON_NAME, what="checkpoint")
        if description.get("finished") is True and not finished_too:
            return
        position = description.get("position") or f"step {description['step']}"
        content = f"{description['identity']['recipe']}, {position}"
    except (ArtifactError, KeyError, TypeError):
        content = "its description cannot be read"
    raise InputError(
        f"{directory} is the checkpoint of an unfinished run: {content}. Continue it with --resume, or remove the directory to start anew."
    )


def save_checkpoint(directory: Path, *, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint in `directory`.

    Args:
        directory: Created if it does not exist.
        description: JSON values: `step`, the steps done, and `identity`, a run is resumed only if its own is equal.
        tensors: The complete state by name.

    Raises:
        ArtifactError: `directory` contains other files, or cannot be written; the previous checkpoint is kept.
    """
    with new_directory(directory, kind=CHECKPOINT) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary / TENSORS_NAME)
        write_json(temporary / JSON_NAME, {**description, "sha256": sha256_of(temporary / TENSORS_NAME)})


def load_checkpoint(directory: Path, identity: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """Steps done, and the state by name.

    Args:
        directory: As given to `save_checkpoint`.
        identity: Identity of the run to be resumed.

    Raises:
        ArtifactError: The checkpoint is missing, damaged or from a different run; the message names the first difference.
    """
    if not holds_checkpoint(directory):
        raise ArtifactError(f"{directory} holds no checkpoint to resume. Start without --resume, or check --out.")
    description = read_json(directory / JSON_NAME, what="checkpoint")
    saved = description.get("identity")
    if saved != json.loads(json.dumps(identity)):
        raise ArtifactError(
            f"{directory} is the checkpoint of another run: {_difference(saved, identity)}. Use the settings it was made with, or remove the directory and start without --resume."
        )
    path = directory / TENSORS_NAME
    try:
        if sha256_of(path) != description.get("sha256"):
            raise ArtifactError(
                f"{path} is damaged: its sha256 is not the one in {JSON_NAME}. Remove {directory} and start without --resume."
            )
        return int(description["step"]), load_file(path)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as err:
        raise ArtifactError(f"{path} cannot be read ({err}). Remove {directory} and start without --resume.") from err


def saved_identity(directory: Path) -> Mapping[str, Any]:
    """Identity of the run that wrote a checkpoint, without a check of its tensors.

    Raises:
        ArtifactError: There is no checkpoint, or its description is damaged.
    """
    if not holds_checkpoint(directory):
        raise ArtifactError(f"{directory} holds no checkpoint to resume. Start without --resume, or check --out.")
    identity = read_json(directory / JSON_NAME, what="checkpoint").get("identity")
    return identity if isinstance(identity, dict) else {}


def _difference(saved: Any, expected: Mapping[str, Any]) -> str:  # Any: whatever the file contains
    if not isinstance(saved, dict):
        return "its settings are missing"
    flat_saved, flat_expected = _flat(saved), _flat(expected)
    name = next(key for key in sorted(flat_saved | flat_expected) if flat_saved.get(key) != flat_expected.get(key))
    return f"{name} is {flat_saved.get(name)!r} there and {flat_expected.get(name)!r} here"


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat

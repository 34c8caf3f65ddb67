"""Compare an engine's graph with its manifest when it is opened, so that a mismatch is refused before the first call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from edm_deploy.errors import ArtifactError
from edm_deploy.runtime.manifest import NAME, Manifest

Expected = tuple[torch.dtype, tuple[int, ...]]


def check_graph(manifest: Manifest, inputs: Mapping[str, Sequence[int | None]], outputs: Iterable[str]) -> None:
    """Check a graph's inputs and outputs.

    Args:
        manifest: Of the engine.
        inputs: Shapes by name, None for a dynamic dimension.
        outputs: Names.

    Raises:
        ArtifactError: They are not those of the manifest.
    """
    declared = {entry.name: entry.dims for entry in manifest.graph_inputs}
    if set(inputs) != set(declared) or not set(manifest.outputs) <= set(outputs):
        raise ArtifactError(
            f"The graph takes {', '.join(sorted(inputs))} and returns {', '.join(sorted(outputs))}; "
            f"{NAME} states {', '.join(sorted(declared))} and {', '.join(manifest.outputs)}. Build the engine again."
        )
    for name, shape in inputs.items():
        dims = declared[name]
        if len(shape) != len(dims) or not all(_fits(manifest, dim, size) for dim, size in zip(dims, shape, strict=True)):
            shown = ["?" if size is None else size for size in shape]
            raise ArtifactError(f"The graph's input {name} has shape {shown}, {NAME} states {list(dims)}. Build the engine again.")


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Expected], *, of: str) -> None:
    """Raises ArtifactError where a tensor of an engine's file is missing or has not its expected dtype and shape.

    Args:
        tensors: By name.
        expected: dtype and shape by name.
        of: What they belong to, for the message.
    """
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            raise ArtifactError(f"{of}: the engine holds no {name}. Build it again.")
        actual = tensors[name]
        if actual.dtype != dtype or tuple(actual.shape) != shape:
            raise ArtifactError(
                f"{of}: {name} is {actual.dtype} {list(actual.shape)}, expected {dtype} {list(shape)}. Build the engine again."
            )


def check_rows(row_of_timestep: Tensor, rows: int, num_train_timesteps: int) -> None:
    """Raises ArtifactError where the map from timesteps to table rows is not int32 [num_train_timesteps] in [0, rows)."""
    check_tensors({"row_of_timestep": row_of_timestep}, {"row_of_timestep": (torch.int32, (num_train_timesteps,))}, of="Tables")
    if int(row_of_timestep.min()) < 0 or int(row_of_timestep.max()) >= rows:
        raise ArtifactError(f"Tables: row_of_timestep points outside the {rows} table rows. Build the engine again.")


def _fits(manifest: Manifest, dim: str | int, size: int | None) -> bool:
    """Whether a graph's size can be the manifest's dimension: a dynamic one may be fixed where its profile has one size."""
    if isinstance(dim, int):
        return size == dim
    sizes = manifest.profile[dim]
    return size is None or sizes.min == sizes.max == size

"""Per-timestep output scaling and input bias correction, applied by the runtime outside the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from edm_deploy.errors import ArtifactError
from edm_deploy.network.family import SAMPLE, TIMESTEP
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.storage.json_schema import MAX_TIMESTEPS, Timestep, Timesteps, convert

DenoiseFn = Callable[[Mapping[str, Tensor]], Tensor]  # graph inputs by name -> the graph's output


@dataclass(frozen=True, kw_only=True)
class _CorrectionDescription:
    """What `Correction.to_json` writes."""

    num_train_timesteps: Timesteps
    first: Annotated[tuple[Timestep, ...], Meta(max_length=MAX_TIMESTEPS)]
    row: Annotated[tuple[Timestep, ...], Meta(max_length=MAX_TIMESTEPS)]
    scale: Annotated[tuple[tuple[float, ...], ...], Meta(min_length=1, max_length=MAX_TIMESTEPS)]
    input_bias: Annotated[tuple[tuple[float, ...], ...], Meta(min_length=1, max_length=MAX_TIMESTEPS)]


@dataclass(frozen=True, eq=False)
class Correction:
    """`prediction = scale[row] * graph(sample - input_bias[row])`, the row selected by each sample's timestep. The rows are independent of those of the activation tables.

    The correction is linear in the prediction, so scaling both halves of a guided batch alike scales their combination.

    Attributes:
        row_of_timestep: int32 [num_train_timesteps].
        scale: float32 [R, C], factors of the prediction's channels; channels of a learned variance are unchanged.
        input_bias: float32 [R, C], subtracted from the sample's channels; additional channels are unchanged.

    Source: Yao et al., Timestep-Aware Correction for Quantized Diffusion Models, ECCV 2024, arXiv 2407.03917.
    """

    row_of_timestep: Tensor
    scale: Tensor
    input_bias: Tensor

    def problem(self, num_train_timesteps: int, channels: int) -> str | None:
        """The violated invariant as a phrase, or None."""
        rows = len(self.scale)
        for name, values in (("scale", self.scale), ("input_bias", self.input_bias)):
            if tuple(values.shape) != (rows, channels) or rows == 0:
                return f"{name} has shape {list(values.shape)}, expected [{rows or 'R'}, {channels}]"
            if not bool(torch.isfinite(values).all()):
                return f"{name} holds NaN or infinity"
        if tuple(self.row_of_timestep.shape) != (num_train_timesteps,):
            return f"row_of_timestep has shape {list(self.row_of_timestep.shape)}, expected [{num_train_timesteps}]"
        if int(self.row_of_timestep.min()) < 0 or int(self.row_of_timestep.max()) >= rows:
            return f"row_of_timestep points outside its {rows} rows"
        return None

    def of_sample(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """`sample` [B, ...] shifted, in the dtype of `sample`; `timestep` is [B]."""
        return sample if not bool(self.input_bias.any()) else _on_channels(sample, -self._at(self.input_bias, sample, timestep), torch.add)

    def of_prediction(self, prediction: Tensor, timestep: Tensor) -> Tensor:
        """`prediction` [B, ...] scaled, in the dtype of `prediction`; `timestep` is [B]."""
        return _on_channels(prediction, self._at(self.scale, prediction, timestep), torch.mul)

    def around(self, run: DenoiseFn) -> DenoiseFn:
        """A graph with the correction applied to its input and output."""

        def corrected(inputs: Mapping[str, Tensor]) -> Tensor:
            timestep = inputs[TIMESTEP.name]
            return self.of_prediction(run({**inputs, SAMPLE: self.of_sample(inputs[SAMPLE], timestep)}), timestep)

        return corrected

    def to_json(self) -> dict[str, Any]:
        """As json, exactly: every float32 is a float64. `row_of_timestep` is run-length encoded as `first` timesteps and their `row`."""
        rows = self.row_of_timestep
        first = [0, *(torch.nonzero(rows.diff())[:, 0] + 1).tolist()]
        return {
            "num_train_timesteps": len(rows),
            "first": first,
            "row": [int(rows[at]) for at in first],
            "scale": self.scale.tolist(),
            "input_bias": self.input_bias.tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Correction:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: A field has another type, or the rows do not cover the schedule.
        """
        description = convert(content, _CorrectionDescription, path="correction")
        ends = [*description.first[1:], description.num_train_timesteps]
        if len(description.row) != len(ends) or description.first[:1] != (0,):
            raise ArtifactError(
                f"correction has {len(description.row)} rows from timesteps {_few(description.first)}, expected one from each, the first 0."
            )
        if any(start >= end for start, end in zip(description.first, ends, strict=True)):
            raise ArtifactError(f"correction.first is {_few(description.first)}, expected ascending timesteps.")
        channels = len(description.scale[0]) if description.scale else 0
        if any(len(row) != channels for row in (*description.scale, *description.input_bias)):
            raise ArtifactError(f"correction has rows of different lengths, expected {channels} channels in each.")
        lengths = torch.tensor([end - start for start, end in zip(description.first, ends, strict=True)])
        correction = cls(
            row_of_timestep=torch.tensor(description.row, dtype=torch.int32).repeat_interleave(lengths),
            scale=torch.tensor(description.scale, dtype=torch.float32),
            input_bias=torch.tensor(description.input_bias, dtype=torch.float32),
        )
        if problem := correction.problem(description.num_train_timesteps, channels):
            raise ArtifactError(f"correction: {problem}.")
        return correction

    def summary(self) -> str:
        """One line of text."""
        low, high = (float(edge) for edge in torch.aminmax(self.scale))
        shift = float(self.input_bias.abs().max())
        return f"prediction times {low:.4f} to {high:.4f}, sample shifted by up to {shift:.4f}, {len(self.scale)} rows"

    def _at(self, table: Tensor, like: Tensor, timestep: Tensor) -> Tensor:
        """float32 [B, C, 1, 1], or [B, 1, C] where `like` is a sequence of tokens."""
        values = table.to(like.device)[table_rows(self.row_of_timestep, timestep).to(like.device)]
        return values[:, :, None, None] if channel_axis(like) == 1 else values[:, None, :]


def latent_channels(shape: Sequence[int]) -> int:
    """Channels of latents of this shape, which is without the batch."""
    return int(shape[0] if len(shape) == 3 else shape[-1])


def _few(numbers: Sequence[int]) -> str:
    return str(list(numbers[:4]))[:-1] + (", ...]" if len(numbers) > 4 else "]")


def channel_axis(sample: Tensor) -> int:
    """Channel axis of a batch of samples: 1 for images, the last for sequences of tokens."""
    return 1 if sample.ndim == 4 else sample.ndim - 1


def _on_channels(value: Tensor, table: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply a function to as many leading channels of `value` as `table` has, in float32; the result has the dtype of `value`."""
    axis = channel_axis(value)
    count = table.shape[axis]
    head = apply(value.narrow(axis, 0, count).float(), table).to(value.dtype)
    rest = value.shape[axis] - count
    return head if rest == 0 else torch.cat([head, value.narrow(axis, count, rest)], dim=axis)

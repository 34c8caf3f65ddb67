"""Statistics of the inputs of layers as matrix products see them: ranges by channel, second moments, and a sample of input vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.observers.channel_scaling import SAMPLES, ChannelRanges
from calibration.recipe import TrainingContext
from calibration.student.module_outputs import input_hooks

VECTORS = 6144  # input vectors of a layer over all timesteps
KEPT = 2048  # of these, kept as they are
AT_ONCE = 1024  # vectors that are added to the moments in one product
GROUP_BYTES = 1 << 30  # of statistics in memory; the layers of a larger model are observed in several passes


@dataclass(frozen=True)
class InputStatistics:
    """Inputs of a layer with N inputs per output, which are `Cin * kernel` in the order of its weight.

    Attributes:
        ranges: Of the input channels by table row, over all values.
        moments: float32 [N, N], the mean of `x x^T`; [0, 0] where they were not requested.
        mean: float32 [N].
        vectors: float32 [V, N], a random sample of input vectors.
        rows: int64 [V], the table row of each vector.
    """

    ranges: ChannelRanges
    moments: Tensor
    mean: Tensor
    vectors: Tensor
    rows: Tensor


class _Collector:
    """Forward pre-hook of one layer. Each call is the next less noisy row."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, rows: int, generator: torch.Generator, *, moments: bool) -> None:
        size = layer.weight[0].numel()
        self.rows, self.generator, self.done = rows, generator, 0
        self.each, self.kept = max(1, VECTORS // rows), max(1, KEPT // rows)
        self.low: list[Tensor] = []
        self.high: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.pending: list[Tensor] = []
        self.moments = torch.zeros(size, size, device=layer.weight.device) if moments else torch.zeros(0, 0)
        self.total, self.count = torch.zeros(size, device=layer.weight.device), 0

    def __call__(self, layer: nn.Conv2d | nn.Linear, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        flat = x.flatten(2).transpose(0, 1).flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).T
        for values, extreme in zip((self.low, self.high), torch.aminmax(flat, dim=1), strict=True):
            values.append(extreme)
        vectors = input_vectors(layer, x, self.each, self.generator)
        self.samples.append(vectors[: self.kept].clone())
        self.pending.append(vectors)
        self.done += 1
        if self.done == self.rows or sum(map(len, self.pending)) >= AT_ONCE:
            self._add()

    def _add(self) -> None:
        vectors, self.pending = torch.cat(self.pending), []
        self.total += vectors.sum(0)
        self.count += len(vectors)
        if len(self.moments):
            self.moments.addmm_(vectors.T, vectors)

    def result(self) -> InputStatistics:
        """The statistics, after one call for each row."""
        ranges = ChannelRanges(torch.stack(self.low[::-1]).clamp(max=0), torch.stack(self.high[::-1]).clamp(min=0))
        rows = torch.cat([torch.full((len(part),), self.rows - 1 - index) for index, part in enumerate(self.samples)])
        vectors = torch.cat(self.samples)
        return InputStatistics(ranges, self.moments / self.count, self.total / self.count, vectors, rows.to(vectors.device))


def input_vectors(layer: nn.Conv2d | nn.Linear, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The input vectors of randomly chosen outputs of a layer: float32 [up to count, N].

    Args:
        layer: An ungrouped convolution, padded with zeros, or a Linear.
        x: float32, its input.
        count: Number of vectors.
        generator: Chooses them.
    """
    if isinstance(layer, nn.Linear):
        flat = x.flatten(0, -2)
        return flat[torch.randint(len(flat), (count,), generator=generator).to(x.device)] if len(flat) > count else flat
    samples = min(len(x), 4)  # the unfolded input is kernel^2 times as large as the input
    x = x[torch.randperm(len(x), generator=generator)[:samples].to(x.device)]
    padding: tuple[int, ...] = (0, 0)
    if not isinstance(layer.padding, str):
        padding = layer.padding
    elif layer.padding == "same":
        height, width = (dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True))
        x = functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    unfolded = functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # type: ignore[arg-type]  # torch's tuples
    flat = unfolded.transpose(1, 2).flatten(0, 1)
    return flat[torch.randint(len(flat), (count,), generator=generator).to(x.device)] if len(flat) > count else flat


@torch.no_grad()
def input_statistics(context: TrainingContext, names: Sequence[str], *, moments: bool, seed: int) -> Iterator[tuple[str, InputStatistics]]:
    """Statistics of the inputs of some layers of the float model, one layer after the other, in the order of `names`.

    Args:
        context: The teacher leads and is observed; up to SAMPLES samples of a new pool pass through the schedule, once for every GROUP_BYTES of
            statistics, and the pool restarts after each pass.
        names: Layers of the teacher, ungrouped.
        moments: Whether to compute second moments.
        seed: Of the choice of vectors.
    """
    teacher, trajectories = context.teacher, context.trajectories
    generator = torch.Generator().manual_seed(seed)
    layers = {name: teacher.model.get_submodule(name) for name in names}
    for group in _groups(layers, moments=moments):
        collectors = {name: _Collector(layers[name], trajectories.rows, generator, moments=moments) for name in group}  # type: ignore[arg-type]
        with input_hooks((layers[name], collector) for name, collector in collectors.items()):
            for _ in range(trajectories.rows):
                trajectories.next_index = 0
                batch = trajectories.next_batch(min(SAMPLES, trajectories.size))
                trajectories.advance(batch, batch.conditioning.combine(teacher(batch.inputs)))
        trajectories.restart()
        for name in group:
            yield name, collectors.pop(name).result()


def _groups(layers: dict[str, nn.Module], *, moments: bool) -> list[list[str]]:
    """Names of layers whose statistics are in memory together."""
    groups: list[list[str]] = []
    left = 0
    for name, layer in layers.items():
        size = layer.weight[0].numel()  # type: ignore[index,operator]  # a Conv2d or Linear
        needed = 4 * size * ((size if moments else 0) + KEPT + AT_ONCE + VECTORS // 8)
        if needed > left:
            groups.append([])
            left = GROUP_BYTES
        groups[-1].append(name)
        left -= needed
    return groups

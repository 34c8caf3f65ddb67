"""How much an error of the prediction at each sampling step changes the final sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.numerics.codes import dequantize_weight, quantize_weight, weight_bounds
from edm_deploy.pipelines.guidance import Conditioner
from edm_deploy.pipelines.noise_schedules import Schedule
from edm_deploy.pipelines.sampling import Denoise
from edm_deploy.storage.cache import cached_json

BITS = 5  # of the weights whose rounding perturbs a prediction: an error of about the size that a good W4A4 model has
POINTS = 6  # steps from which a perturbed walk continues to the end; between them the effect is interpolated
SAMPLES = 8  # trajectories,
FORWARD_BATCH = 4  # of one forward pass, which takes less memory than a training step


def cached_step_weights(
    model: nn.Module,
    run: Callable[[Mapping[str, Tensor]], Tensor],
    schedule: Schedule,
    conditioner: Conditioner,
    *,
    digest: str,
    device: torch.device,
) -> Tensor:
    """`step_weights` of a model and a schedule, computed once on a machine.

    Args:
        model: The float model.
        run: Its prediction by graph inputs, float32.
        schedule: R timesteps.
        conditioner: Draws the conditioning of the trajectories.
        digest: Hash of the model's weights.
        device: Device of the model.
    """

    def compute() -> list[float]:
        generator = torch.Generator().manual_seed(0)  # independent of the run's seed
        noise = torch.randn(SAMPLES, *conditioner.family.latent_shape(conditioner.config), generator=generator).to(device)
        drawn = {name: value.to(device) for name, value in conditioner.draw(SAMPLES, generator).items()}
        predict = conditioner.of(drawn).denoiser(run, FORWARD_BATCH)
        return [float(weight) for weight in step_weights(model, predict, schedule, noise)]

    def valid(found: Any) -> bool:
        return (
            isinstance(found, list)
            and len(found) == len(schedule.timesteps)
            and all(isinstance(each, float) and each > 0 for each in found)
        )

    steps = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(schedule).items()}
    key = [BITS, POINTS, SAMPLES, digest, type(schedule).__name__, steps, conditioner.scale, conditioner.origin]
    return torch.tensor(cached_json("step-weights", key, compute, valid=valid))


@torch.no_grad()
def step_weights(model: nn.Module, predict: Denoise, schedule: Schedule, noise: Tensor) -> Tensor:
    """Squared change of the final sample for each unit of squared error of the prediction at one step, by step.

    The prediction of one step is replaced by that of the same model with its weights rounded, and the walk continues with the float model. Rounded
    weights, because the effect depends on the kind of error: on the reference model white noise of the same power at the middle steps changes the
    image ten times less than the error of a 4-bit model, and rounded weights change it as much. The effect of a change of the sample on the final sample is
    smooth in the step, so that it is measured from a few steps and interpolated on a logarithmic scale.

    Args:
        model: The float model, whose weights are rounded while a perturbed prediction is computed, and restored.
        predict: Its prediction, combined under guidance.
        schedule: R timesteps.
        noise: float32 [B, ...], initial samples.

    Returns:
        float32 [R], each > 0, in sampling order: the noisiest step first.
    """
    count, zeros = len(schedule.timesteps), torch.zeros_like(noise)
    tiny = torch.finfo(torch.float32).tiny

    def predicted(sample: Tensor, position: int) -> Tensor:
        return predict(sample, schedule.timesteps[position].float().to(sample.device).expand(len(sample)))

    def stepped(sample: Tensor, prediction: Tensor, position: int) -> Tensor:
        return schedule.previous(sample, prediction, torch.full((len(sample),), position), zeros, 0.0)

    samples, predictions = [noise], []
    for position in range(count):
        predictions.append(predicted(samples[-1], position))
        samples.append(stepped(samples[-1], predictions[-1], position))
    of_step, of_walk = torch.empty(count), {}
    points = {round(share * (count - 1) / max(POINTS - 1, 1)) for share in range(POINTS)}
    for position in range(count):
        with weights_rounded(model):
            perturbed = predicted(samples[position], position)
        moved = stepped(samples[position], perturbed, position)
        change = float((moved - samples[position + 1]).square().sum())
        of_step[position] = change / max(float((perturbed - predictions[position]).square().sum()), tiny)
        if position in points:
            for later in range(position + 1, count):
                moved = stepped(moved, predicted(moved, later), later)
            of_walk[position] = float((moved - samples[-1]).square().sum()) / max(change, tiny)
    return (of_step * _interpolated(of_walk, count)).clamp(min=tiny)


@contextmanager
def weights_rounded(model: nn.Module, bits: int = BITS) -> Iterator[None]:
    """Within the context every Conv2d and Linear computes with its weight rounded to `bits` bits, each output channel scaled to its largest magnitude."""
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                held: list[nn.Parameter] = []
                stack.callback(layer.register_forward_pre_hook(_round(held, bits)).remove)
                # Before other hooks: one that releases weights widened for the call must find those that it set.
                stack.callback(layer.register_forward_hook(_restore(held), prepend=True, always_call=True).remove)
        yield


def _round(held: list[nn.Parameter], bits: int) -> Callable[..., None]:
    def hook(layer: Any, _: object) -> None:
        weight = layer.weight.detach().float()
        scale = (weight.abs().flatten(1).amax(1) / weight_bounds(bits)[1]).clamp(min=torch.finfo(torch.float32).tiny)
        held.append(layer.weight)
        rounded = dequantize_weight(quantize_weight(weight, scale, bits), scale).to(layer.weight.dtype)
        layer.weight = nn.Parameter(rounded, requires_grad=False)

    return hook


def _restore(held: list[nn.Parameter]) -> Callable[..., None]:
    def hook(layer: Any, *_: object) -> None:
        if held:
            layer.weight = held.pop()

    return hook


def _interpolated(values: dict[int, float], count: int) -> Tensor:
    """Values at some of `count` positions, the first and last among them, interpolated on a logarithmic scale: float32 [count]."""
    known = sorted(values)
    logs = torch.tensor([values[position] for position in known]).clamp(min=torch.finfo(torch.float32).tiny).log()
    result = torch.empty(count)
    result[known[0]] = logs[0]
    for index, (left, right) in enumerate(itertools.pairwise(known)):
        result[left : right + 1] = torch.lerp(logs[index], logs[index + 1], torch.linspace(0, 1, right - left + 1))
    return result.exp()

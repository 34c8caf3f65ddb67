"""Steps of common schedulers for several images at once, each at its own position of its own schedule, with the results that diffusers has for one.

Each operation is one rounded product, sum, quotient or bound of float32 numbers, which is the same for an element wherever it is in a tensor. So an image does
not depend on the others, and is equal in every bit to that of the diffusers scheduler, which the tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["ddim", "euler", "flow", "dpm"]


@dataclass(frozen=True)
class StepTable:
    """What a scheduler's steps are computed from.

    Attributes:
        kind: The formula.
        coefficients: float32 [N, K], by position.
        clip: Bound of the estimated clean sample; None for none.
    """

    kind: Kind
    coefficients: Tensor
    clip: float | None = None


@dataclass(frozen=True)
class Taken:
    """Results of a step.

    Attributes:
        latents: float32 [n, ...], the samples at the next timestep.
        scaled: float32 [n, ...], the denoiser's input there; None where it is the sample.
        clean: float32 [n, ...], estimated clean samples that the next step needs; None where it needs none.
    """

    latents: Tensor
    scaled: Tensor | None = None
    clean: Tensor | None = None


def table_of(scheduler: Any, begin: int) -> StepTable | None:
    """The steps of a diffusers scheduler from position `begin` on; None where it has another formula, and its own `step` is to be used.

    Args:
        scheduler: A scheduler whose steps are set.
        begin: Position in its timesteps.
    """
    name, config = type(scheduler).__name__, scheduler.config
    plain = config.get("prediction_type", "epsilon") == "epsilon" and not config.get("thresholding", False)
    if name == "DDIMScheduler" and plain:
        return StepTable("ddim", _ddim(scheduler)[begin:], float(config.clip_sample_range) if config.clip_sample else None)
    if name == "EulerDiscreteScheduler" and plain:
        return StepTable("euler", _euler(scheduler)[begin:])
    if name == "FlowMatchEulerDiscreteScheduler" and not config.get("stochastic_sampling", False):
        return StepTable("flow", scheduler.sigmas.float().diff()[begin:, None])
    second = (
        config.get("algorithm_type") == "dpmsolver++" and config.get("solver_type") == "midpoint" and config.get("solver_order") in (1, 2)
    )
    if name == "DPMSolverMultistepScheduler" and plain and second and not config.get("use_flow_sigmas", False):
        return StepTable("dpm", _dpm(scheduler, begin))
    return None


def take(table: StepTable, rows: Tensor, latents: Tensor, prediction: Tensor, clean: Tensor | None) -> Taken:
    """One step of n images.

    Args:
        table: Kind and bound; its coefficients are not used.
        rows: float32 [n, K], the coefficients of each image.
        latents: float32 [n, ...].
        prediction: float32 [n, ...].
        clean: float32 [n, ...], what the last step returned; of images at the first step anything finite. None where the kind needs none.

    Source: DDIM, arXiv 2010.02502, equation 12; Karras et al., arXiv 2206.00364, algorithm 2 without churn; Esser et al., arXiv 2403.03206; Lu et al.,
        DPM-Solver++, arXiv 2211.01095, algorithm 2 (2M).
    """
    shape = (-1, *[1] * (latents.ndim - 1))
    a, b, c, d, e, f = (
        column.reshape(shape) for column in torch.nn.functional.pad(rows, (0, 6 - rows.shape[1])).to(latents.device).unbind(1)
    )
    match table.kind:
        case "ddim":  # a: noise, b: signal, c: signal at the next timestep, d: noise there
            estimate = (latents - a * prediction) / b
            if table.clip is not None:
                estimate = estimate.clamp(-table.clip, table.clip)
            following = c * estimate + d * prediction
            return Taken(following)
        case "euler":  # a: sigma, b: its difference to the next, c: scale of the next input
            estimate = latents - a * prediction
            following = latents + (latents - estimate) / a * b
            return Taken(following, following / c)
        case "flow":  # a: difference of sigma to the next
            following = latents + a * prediction
            return Taken(following)
        case "dpm":  # a: noise, b: signal, c: ratio of noises, d: of the estimate, e: 1 / r0 or 0 at first order, f: d / 2
            estimate = (latents - a * prediction) / b
            first = c * latents - d * estimate
            assert clean is not None
            second = first - f * (e * (estimate - clean))
            return Taken(torch.where(e == 0, first, second), clean=estimate)


def _ddim(scheduler: Any) -> Tensor:
    timesteps = scheduler.timesteps.long().cpu()
    earlier = timesteps - scheduler.config.num_train_timesteps // len(timesteps)
    alpha = scheduler.alphas_cumprod[timesteps]
    following = torch.where(earlier >= 0, scheduler.alphas_cumprod[earlier.clamp(min=0)], torch.as_tensor(scheduler.final_alpha_cumprod))
    return torch.stack([(1 - alpha) ** 0.5, alpha**0.5, following**0.5, (1 - following) ** 0.5], dim=1)


def _euler(scheduler: Any) -> Tensor:
    sigmas = scheduler.sigmas.float().cpu()
    now, then = sigmas[:-1], sigmas[1:]
    return torch.stack([now, then - now, (then**2 + 1) ** 0.5], dim=1)


def _dpm(scheduler: Any, begin: int) -> Tensor:
    """Each logarithm and exponential of a number by itself, as the scheduler computes it."""
    config, count = scheduler.config, len(scheduler.timesteps)
    converted = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in scheduler.sigmas]
    lambdas = [torch.log(alpha) - torch.log(sigma) for alpha, sigma in converted]
    lower = config.euler_at_final or (config.lower_order_final and count < 15) or config.final_sigmas_type == "zero"
    rows = []
    for position in range(begin, count):
        (alpha, sigma), (alpha_then, sigma_then) = converted[position], converted[position + 1]
        step = lambdas[position + 1] - lambdas[position]
        of_estimate = alpha_then * (torch.exp(-step) - 1.0)
        at_first_order = config.solver_order == 1 or position == begin or (position == count - 1 and lower)
        inverse = torch.zeros(()) if at_first_order else 1.0 / ((lambdas[position] - lambdas[position - 1]) / step)
        rows.append(torch.stack([sigma, alpha, sigma_then / sigma, of_estimate, inverse, 0.5 * of_estimate]))
    return torch.stack(rows).float()

"""A training that cannot have helped: a loss that is not finite ends it, one that has risen, or a budget for a few steps only, is reported."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from statistics import fmean

from edm_deploy.errors import InputError

RISEN = 3.0  # times the first loss; batches are balanced over the timesteps, so losses of one state differ by less
# `efficientdm`, preset demo, W8A8 on the reference model: 28.7 dB after 15 steps, 33.8 dB without training, 35.3 dB after 120 steps.
FEW_STEPS = 50
log = logging.getLogger(__name__)


def check_finite(loss: float, position: str) -> None:
    """Raises InputError if a loss is NaN or infinite, after `position`: the parameters cannot recover from it."""
    if not math.isfinite(loss):
        raise InputError(f"Training diverged: the loss is {loss} after {position}, expected a finite number. Set lower rates.")


def warn_if_risen(first: float, last: Collection[float]) -> None:
    """Log a warning if the mean of the last losses is far above the first one."""
    if last and fmean(last) > RISEN * first:
        log.warning(
            "Training diverged: the loss rose from %.4g to %.4g, so the result is worse than without training. Set lower rates.",
            first,
            fmean(last),
        )


def warn_if_few(steps: int, seconds: float) -> None:
    """Log a warning if a budget of `seconds` had time for a few steps only, after which the parameters are still those of the first noisy gradients."""
    if steps < FEW_STEPS:
        log.warning(
            "The budget of %.4g s had time for %d training steps, fewer than %d: the result can be worse than calibration alone. "
            "Set a longer --budget, or use calibrate.",
            seconds,
            steps,
            FEW_STEPS,
        )

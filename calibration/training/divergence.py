"""Divergence of a training: a loss that is not finite ends it, one that has risen is reported."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from statistics import fmean

from edm_deploy.errors import InputError

RISEN = 3.0  # times the first loss; batches are balanced over the timesteps, so losses of one state differ by less
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

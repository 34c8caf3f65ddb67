"""Stagger a pool of trajectories over the schedule without observing anything: for a student whose ranges are set already."""

from __future__ import annotations

import torch

from calibration.data.trajectory_pool import FORWARD_BATCH
from calibration.recipe import TrainingContext
from calibration.run.options import Interrupted
from calibration.run.processes import check_shares
from calibration.run.progress import ProgressMeter


@torch.no_grad()
def stagger(context: TrainingContext) -> None:
    """Lead all samples once through the schedule by the teacher, as calibration does, and leave them evenly staggered.

    Raises:
        Interrupted: SIGINT or SIGTERM; there is no state worth saving yet.
    """
    trajectories, processes = context.trajectories, context.run.options.processes
    check_shares(processes, trajectories.batch_sizes(FORWARD_BATCH), what="calibration_samples")
    with ProgressMeter(context.run, "calibrate", trajectories.device) as meter:
        for done, (_, batches) in enumerate(trajectories.traverse_schedule(FORWARD_BATCH), start=1):
            for batch in batches:
                trajectories.advance(batch, context.prediction(context.teacher, batch))
            meter.report(done, trajectories.rows)
            if processes.any(meter.interrupted):
                raise Interrupted("Interrupted before training; nothing was written. Run the same command again.")

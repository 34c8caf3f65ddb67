"""Workers on Ray Data: an actor pool that holds engines, to which the missing shards are given one at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm_deploy.errors import UnsupportedError, first_line
from edm_deploy_tools.common.machine import versions
from edm_deploy_tools.common.ray_cluster import LOCAL, cluster
from edm_deploy_tools.generation.plan import GenerationPlan
from edm_deploy_tools.generation.worker import ShardWorker
from edm_deploy_tools.images.shards import ShardRange


def on_ray(plan: GenerationPlan, out: Path, missing: list[ShardRange], *, workers: int, address: str | None) -> Iterator[dict[str, Any]]:
    """Make shards by `workers` actors; yields the rows of `ShardWorker` as they are made.

    Each actor reserves as many CPUs as its engine has threads, and one GPU where the plan's device is cuda. An actor that is killed is restarted by Ray and
    its shard is given out again; shards are written atomically, so that one which was made twice is one file.

    Raises:
        UnsupportedError: Ray is not installed or not reachable, or ends the run.
    """
    with cluster(address or LOCAL, cpus=workers * plan.threads) as ray:
        import ray.data as data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.actor_init_retry_on_errors = False  # ShardWorker reports what is wrong in its rows
        context.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ranges = [{"start": shard.start, "stop": shard.stop} for shard in missing]
        gpu = {"num_gpus": 1} if plan.device is not None and torch.device(plan.device).type == "cuda" else {}
        rows = data.from_items(ranges, override_num_blocks=len(ranges)).map_batches(
            ShardWorker,
            compute=data.ActorPoolStrategy(size=min(workers, len(ranges)), max_tasks_in_flight_per_actor=1),
            batch_size=1,
            batch_format="numpy",
            fn_constructor_kwargs={"plan": plan, "out": out.resolve(), "expected": versions()},
            num_cpus=plan.threads,
            **gpu,
        )
        try:
            for row in rows.iter_rows():
                yield {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
        except ray.exceptions.RayError as err:
            raise UnsupportedError(f"Ray ended the run: {first_line(err)}. Run the command again to continue it.") from err

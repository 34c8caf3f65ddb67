"""The time that the serving loop adds to the calls of an engine, at full slots: `python -m edm_deploy_tools.serving_overhead ENGINE_DIR`."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from edm_deploy.network.family import SAMPLE, TIMESTEP
from edm_deploy.serving.interface import ImageRequest
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common import options as opt

app = run_app.app_with()


@dataclass(frozen=True)
class Round:
    """Times of one round, in seconds for each call of the engine.

    Attributes:
        bare: Calls of the engine alone, with inputs at hand.
        served: The same number of calls by the loop, from its first to its last, while more images wait than it has slots.
        occupancy: Share of rows that images used.
    """

    bare: float
    served: float
    occupancy: float

    @property
    def overhead(self) -> float:
        """What the loop adds, as a share of the bare call."""
        return self.served / self.bare - 1


def measure(model: ServedModel, replica: Replica, number: int, calls: int, schedulers: tuple[str, ...]) -> Round:
    """One round: bare calls, then the loop with as many samples at steps 20 to 40 of the schedulers in turn.

    Args:
        model: A pixel-space model without conditioning.
        replica: Its replica, which is idle.
        number: Number of the round.
        calls: Calls of the engine by the loop, at least 2.
        schedulers: Short names.
    """
    generator = torch.Generator().manual_seed(number)
    inputs = {
        SAMPLE: torch.randn(model.slots, *model.family.sample_shape(model.config), generator=generator),
        TIMESTEP.name: torch.linspace(1, 999, model.slots),
    }
    start = time.perf_counter()
    for _ in range(calls):
        model.denoiser.run(inputs)
    bare = (time.perf_counter() - start) / calls
    return asyncio.run(_served(model, replica, bare, number, calls, schedulers))


async def _served(model: ServedModel, replica: Replica, bare: float, number: int, calls: int, schedulers: tuple[str, ...]) -> Round:
    async def ask(index: int) -> None:
        request = ImageRequest(id=f"{number}-{index}", seed=index, steps=20 + index % 21, scheduler=schedulers[index % len(schedulers)])
        async for _ in replica.submit(request):
            pass

    count = model.slots * (2 + calls // 20)
    tasks = [asyncio.create_task(ask(index)) for index in range(count)]
    stats = await replica.stats()
    while stats.running < model.slots:
        await asyncio.sleep(0.001)
        stats = await replica.stats()
    first, start = stats, time.perf_counter()
    for _ in itertools.count():
        await asyncio.sleep(0.01)
        stats = await replica.stats()
        if stats.calls >= first.calls + calls or stats.requests <= model.slots:
            break
    seconds, done = time.perf_counter() - start, stats.calls - first.calls
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Round(bare, seconds / done, (stats.rows - first.rows) / (done * model.slots))


@app.command(epilog="Example: python -m edm_deploy_tools.serving_overhead engine-openvino --rounds 15")
def main(
    engine: opt.Engine,
    slots: Annotated[int | None, typer.Option(min=1, help="Rows of a call, as of `serve`.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; bare calls and the loop take turns.")] = 9,
    calls: Annotated[int, typer.Option(min=2, help="Calls of the engine in a round, of each.")] = 40,
    scheduler: Annotated[
        list[str] | None, typer.Option(help="Schedulers of the requests, in turn; repeatable. Default: ddim, euler, dpm-solver++.")
    ] = None,
) -> None:
    """Measure what the serving loop adds to the calls of an engine at full slots: checks, assembly of rows, schedulers, decoding, events."""
    model = ServedModel(Path(engine), name="measured", slots=slots)
    model.warm_up()
    replica = Replica(model, Limits(queue=100_000))
    found = [measure(model, replica, number, calls, tuple(scheduler or ("ddim", "euler", "dpm-solver++"))) for number in range(rounds)]
    replica.close()
    bare, served, overhead, occupancy = (
        statistics.median(getattr(each, name) for each in found) for name in ("bare", "served", "overhead", "occupancy")
    )
    spread = sorted(each.overhead for each in found)
    console.say(
        f"{model.slots} slots, {rounds} rounds of {calls} calls: bare {bare * 1e3:.1f} ms, served {served * 1e3:.1f} ms a call (medians); "
        f"overhead {overhead:.1%} ({spread[0]:.1%} to {spread[-1]:.1%}), occupancy {occupancy:.1%}."
    )


if __name__ == "__main__":
    sys.exit(run_app.run(app, "python -m edm_deploy_tools.serving_overhead"))

"""The command `bench-serve`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


def bench_serve(
    engine: opt.Engine,
    slots: Annotated[int | None, typer.Option(min=1, help="Rows of each call, as in serve.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine. Default: as it was built.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each measurement.")] = 100,
    load: Annotated[
        list[float] | None,
        typer.Option(
            "--load",
            metavar="SHARE",
            help="Offered load, as a share of the capacity of in-flight batching; repeatable. Default: 0.5, 0.8, 0.95.",
        ),
    ] = None,
    steps: Annotated[str, typer.Option(metavar="FEWEST:MOST", help="Steps of a request.")] = "10:50",
    rounds: Annotated[int, typer.Option(help="How often each load is measured; figures are medians.")] = 1,
    overhead_seconds: Annotated[
        float, typer.Option("--overhead-seconds", help="Time of each measurement of the overhead; 0 leaves it out.")
    ] = 20.0,
    seed: Annotated[int, opt.seed_option("Seed of requests and arrivals.")] = 0,
    as_json: opt.Json = False,
) -> None:
    """Measure in-flight batching against static batches and one request at a time: capacity, latency at shares of it, overhead."""
    from edm_deploy.errors import InputError
    from edm_deploy_tools.serving.bench.bench import BenchSettings, bench_serving

    fewest, _, most = steps.partition(":")
    if not (fewest.isdigit() and (most or fewest).isdigit()):
        raise InputError(f"--steps {steps}: expected FEWEST:MOST, such as 10:50.")
    settings = BenchSettings(
        slots=slots,
        threads=threads,
        requests=requests,
        loads=tuple(load or (0.5, 0.8, 0.95)),
        steps=(int(fewest), int(most or fewest)),
        rounds=rounds,
        overhead_seconds=overhead_seconds,
        seed=seed,
    )
    result = bench_serving(engine, settings, notify=console.note)
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_table(f"Capacity, {result.slots} slots", _capacity_rows(result.capacities))
    for share in settings.loads:
        console.print_table(f"{share:.0%} of the capacity of in-flight batching", _load_rows(result.loaded, share))
    if result.overhead:
        bare = result.overhead["bare"]
        console.say(
            f"A call with full slots: engine {1000 * bare:.1f} ms; loop {1000 * result.overhead['loop']:.1f} ms "
            f"({result.overhead['loop'] / bare - 1:+.1%}); server {1000 * result.overhead['server']:.1f} ms ({result.overhead['server'] / bare - 1:+.1%})"
        )
    console.print_facts(result.conditions)


def _capacity_rows(capacities: dict[str, float]) -> list[dict[str, Any]]:
    first = next(iter(capacities.values()))
    return [{"service": name, "requests/s": each, "in-flight is": f"{first / each:.2f}x"} for name, each in capacities.items()]


def _load_rows(loaded: dict[str, Any], share: float) -> list[dict[str, Any]]:
    from statistics import median

    rows = []
    for name, figures in loaded.items():
        here = [each for each in figures if each.load == share]
        row: dict[str, Any] = {"service": name}
        for column, key in (("offered/s", "offered"), ("answered/s", "throughput"), ("p50 s", "p50"), ("p95 s", "p95"), ("p99 s", "p99")):
            row[column] = median(getattr(each, key) for each in here)
        row["occupancy"] = f"{median(each.occupancy for each in here):.1%}"
        rows.append(row)
    return rows

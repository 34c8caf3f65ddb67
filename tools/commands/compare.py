"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


def compare(
    model: opt.Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the comparison; completed experiments in it are kept.")],
    recipes: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="all, or recipes separated by commas: mse, static:calibrator=mse with a setting, efficientdm+tac with a pass.",
        ),
    ] = "all",
    bits: Annotated[str, typer.Option(metavar="LIST", help="Bits of weights and activations, separated by commas.")] = "W8A8,W4A8,W4A4",
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Wall time of calibration and training for each recipe that trains: 30s, 5m or 1h.")
    ] = "5m",
    rows: Annotated[int, typer.Option(help="Number of calibrated timesteps, one table row each.")] = 20,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            metavar="RECIPE=NAME",
            help="Shipped preset, TOML file, or published for the recipe's defaults; repeatable. Default: demo-RECIPE if it is shipped.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs of each recipe that trains, with seeds 0, 1, ...")] = 1,
    samples: Annotated[int, typer.Option(help="Samples of each model to evaluate for each seed, at least 2.")] = 64,
    steps: Annotated[int, typer.Option(help="Inference steps of the samples.")] = 20,
    seed: opt.EvaluationSeeds = None,
    guidance: opt.Guidance = None,
    prompts: opt.Prompts = None,
    backend: opt.For = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND",
            help="Evaluate engines of this backend, built for it and deleted again, instead of the reference executor: several times faster.",
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Compare recipes on MODEL at an equal budget; writes results.json, table.md and report.html. Run it again to continue."""
    from calibration.run.time_budget import seconds_of
    from edm_deploy_tools.comparison.compare import REPORT, RESULTS, TABLE, ComparisonRequest, compare_recipes
    from edm_deploy_tools.comparison.grid import presets_of
    from edm_deploy_tools.comparison.report import comparison_markdown
    from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings

    request = ComparisonRequest(
        recipes=recipes,
        bits=bits,
        budget=seconds_of(budget),
        presets=presets_of(preset or ()),
        rows=rows,
        seeds=seeds,
        backend=backend,
        engine=engine,
        prompts=prompts,
        settings=EvaluationSettings(samples=samples, steps=steps, seeds=opt.evaluation_seeds(seed), guidance=guidance),
    )
    results = compare_recipes(model, out, request, notify=console.note)
    if as_json:
        console.print_json(results)
        return
    console.say(comparison_markdown(results))
    console.wrote(out / RESULTS, "all figures")
    console.wrote(out / TABLE, "the table")
    console.wrote(out / REPORT, "the same figures with charts and images")

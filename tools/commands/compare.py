"""The command that compares recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.commands import options as opt
from edm_deploy_tools.common import console


def compare(
    model: opt.Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the comparison; what stands in it is kept.")],
    recipes: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="all, or some with commas: mse, static:calibrator=mse with a setting, efficientdm+tac with a pass."
        ),
    ] = "all",
    bits: Annotated[str, typer.Option(metavar="LIST", help="Schemes with commas.")] = "W8A8,W4A8,W4A4",
    budget: Annotated[str, typer.Option(metavar="TIME", help="Wall time of calibration and training of each recipe that trains.")] = "5m",
    rows: Annotated[int, typer.Option(help="Timesteps to calibrate; one table row each.")] = 20,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", metavar="RECIPE=NAME", help="A shipped preset, a TOML file, or published; default: demo-RECIPE where it is shipped."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each recipe that trains.")] = 1,
    samples: Annotated[int, typer.Option(help="Samples of each model that are judged.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps that they are drawn in.")] = 20,
    seed: Annotated[int, typer.Option(help="Of their noise.")] = 123,
    guidance: opt.Guidance = None,
    prompts: opt.Prompts = None,
    backend: opt.For = None,
    as_json: opt.Json = False,
) -> None:
    """Compare recipes on MODEL at an equal budget; writes results.json, table.md and report.html. Run it again to go on after an interruption."""
    from calibration.run.time_budget import seconds_of
    from edm_deploy_tools.comparison.compare import REPORT, RESULTS, TABLE, ComparisonRequest
    from edm_deploy_tools.comparison.compare import compare as run
    from edm_deploy_tools.comparison.grid import presets_of
    from edm_deploy_tools.comparison.report import markdown_of
    from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings

    asked = ComparisonRequest(
        recipes=recipes,
        bits=bits,
        budget=seconds_of(budget),
        presets=presets_of(preset or ()),
        rows=rows,
        seeds=seeds,
        backend=backend,
        prompts=prompts,
        setup=EvaluationSettings(samples=samples, steps=steps, seed=seed, guidance=guidance),
    )
    results = run(model, out, asked, say=console.note)
    if as_json:
        console.print_json(results)
        return
    console.say(markdown_of(results))
    console.wrote(out / RESULTS, "every figure")
    console.wrote(out / TABLE, "the table")
    console.wrote(out / REPORT, "the same to look at")

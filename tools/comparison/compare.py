"""Compare recipes on one model at an equal budget of wall time: each experiment runs in a new process, then its artifact is evaluated.

Completed experiments are kept: an interrupted comparison continues, and one with further recipes or schemes runs only the new ones.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts
from edm_deploy.pipelines.prompt_file import read_prompts
from edm_deploy.pipelines.source import Source, load_source
from edm_deploy.runtime.capabilities import capabilities_of
from edm_deploy.storage.directories import read_json, write_json
from edm_deploy.storage.output_directory import DirectoryKind, check_output
from edm_deploy_tools.common.child_process import run_measured
from edm_deploy_tools.common.console import Notify, finite, silent, time_words
from edm_deploy_tools.common.machine import machine, versions
from edm_deploy_tools.comparison.artifact_evaluator import ARTIFACT, IMAGES, MEASURED, ArtifactEvaluator, json_of
from edm_deploy_tools.comparison.grid import Experiment, check_experiments, entries_of, experiments_of, schemes_of
from edm_deploy_tools.comparison.report import comparison_html, comparison_markdown
from edm_deploy_tools.evaluation.trajectory_error import (
    EvaluationSettings,
    reference_trajectory,
)

MARKER = "compare.json"
COMPARISON = DirectoryKind("a comparison", MARKER, ("*",))  # never replaced
RESULTS, REPORT, TABLE = "results.json", "report.html", "table.md"
MADE = "made.json"
SHOWN = 8  # images of each model in the report


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """A comparison, as the command line specifies it.

    Attributes:
        recipes: `all`, or recipes separated by commas.
        bits: Schemes separated by commas.
        budget: Seconds of calibration and training of each experiment that trains.
        presets: Preset or TOML file by recipe.
        rows: Rows of the activation tables.
        seeds: Runs of each recipe that trains.
        backend: Backend that must support every scheme; None checks nothing.
        engine: Backend whose engines are evaluated; None evaluates with the reference executor.
        prompts: Prompt file for calibrating a text-conditional model; None is the built-in list.
        settings: Samples that the models are evaluated on.
    """

    recipes: str
    bits: str
    budget: float
    presets: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: int = 20
    seeds: int = 1
    backend: str | None = None
    engine: str | None = None
    prompts: Path | None = None
    settings: EvaluationSettings = dataclasses.field(default_factory=lambda: EvaluationSettings(samples=64))

    def to_json(self) -> dict[str, Any]:
        """All fields by name; `settings` is called `setup` in the files."""
        content = json_of(self)
        return content | {"setup": content.pop("settings")}


def compare_recipes(model: str, out: Path, request: ComparisonRequest, *, notify: Notify = silent) -> dict[str, Any]:
    """Run or continue a comparison; results.json, table.md and report.html in `out` are rewritten after every experiment.

    Args:
        model: A local diffusers directory or a hub id.
        out: Directory of the comparison; completed experiments in it are kept.
        request: Recipes, schemes, budget.
        notify: Called with a line of text at each stage.

    Returns:
        The content of results.json.

    Raises:
        UnsupportedError, InputError, ArtifactError: The request is invalid; all checks come before anything is quantized.
    """
    check_output(out, kind=COMPARISON)
    targets = [capabilities_of(name) for name in (request.backend, request.engine) if name]
    settings = request.settings
    if settings.samples < 2:
        raise InputError(f"--samples {settings.samples}: a Frechet distance needs at least 2. Increase --samples.")
    entries = entries_of(request.recipes, request.presets)
    experiments = experiments_of(entries, schemes_of(request.bits), rows=request.rows, seeds=request.seeds, budget=request.budget)
    source = load_source(model)
    prompts = () if request.prompts is None else read_prompts(request.prompts)
    if prompts:
        check_takes_prompts(source)
    digest = source.digest()
    notify(f"float model: {settings.trajectories} samples in {settings.steps} steps, twice")
    reference = reference_trajectory(source, settings)
    check_experiments(experiments, source, targets, forward_seconds=reference.seconds, batch=settings.trajectories)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {"model": model, "model_sha256": digest, "asked": request.to_json()})
    evaluator = ArtifactEvaluator(reference, backend=request.engine)
    figures: dict[Path, dict[str, Any]] = {}
    for number, experiment in enumerate(experiments, start=1):
        seed = f", seed {experiment.seed}" if experiment.seed else ""
        notify(f"{number}/{len(experiments)} {experiment.scheme} {experiment.entry.label}{seed}")
        directory = out / experiment.folder
        made = run_experiment(experiment, model, directory, experiment.identity(digest, prompts), request, notify)
        figures[experiment.folder] = made if "failed" in made else made | evaluator.figures(directory, notify)
        header = {"model": _model_json(source, model, digest), "asked": request.to_json()}
        results: dict[str, Any] = finite(header | _results(evaluator, experiments[:number], figures))
        write_results(results, evaluator, out, experiments[:number])
    return results


def run_experiment(
    experiment: Experiment, model: str, directory: Path, identity: dict[str, Any], request: ComparisonRequest, notify: Notify
) -> dict[str, Any]:
    """Quantize in a new process, unless a completed run of the same experiment exists; its wall time and peak memory, or why it failed."""
    if (completed := _completed(directory, identity)) is not None:
        return completed
    for leftover in (ARTIFACT, ARTIFACT + ".checkpoint", MEASURED):
        shutil.rmtree(directory / leftover, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MADE).unlink(missing_ok=True)
    measured = run_measured(experiment.command(model, (directory / ARTIFACT).absolute(), prompts=request.prompts), cwd=Path.cwd())
    if measured.returncode:
        notify(f"  failed: {measured.last_line}")
        return {"identity": identity, "failed": measured.last_line.removeprefix("Error: ")}
    made = {"identity": identity, "seconds": measured.seconds, "peak_bytes": measured.peak_bytes}
    temporary = directory / f".{MADE}"
    write_json(temporary, made)
    os.replace(temporary, directory / MADE)
    notify(f"  quantized in {time_words(measured.seconds)}")
    return made


def _completed(directory: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a completed experiment with this identity; None if it must be run."""
    try:
        made = read_json(directory / MADE, what="cell")
        Artifact.load(directory / ARTIFACT)
    except ArtifactError:
        return None
    return made if made.get("identity") == json.loads(json.dumps(identity)) else None


def write_results(results: dict[str, Any], evaluator: ArtifactEvaluator, out: Path, experiments: Sequence[Experiment]) -> None:
    """Write results.json, table.md and report.html, each replaced atomically."""
    images = {"float": evaluator.images[:SHOWN]}
    for experiment in experiments:
        path = out / experiment.folder / MEASURED / IMAGES
        if path.is_file():
            images[str(experiment.folder)] = load_file(path)["images"][:SHOWN].float()
    for name, text in (
        (RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n"),
        (TABLE, comparison_markdown(results)),
        (REPORT, comparison_html(results, images)),
    ):
        temporary = out / f".{name}"
        temporary.write_text(text)
        os.replace(temporary, out / name)


def _results(evaluator: ArtifactEvaluator, experiments: Sequence[Experiment], figures: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    reference = evaluator.reference
    cells = [
        {
            "recipe": experiment.entry.label,
            "scheme": experiment.scheme,
            "seed": experiment.seed,
            "trains": experiment.budget is not None,
            "folder": str(experiment.folder),
        }
        | figures[experiment.folder]
        for experiment in experiments
    ]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "walk": {"scheduler": reference.scheduler, "guidance": reference.guidance, "timesteps": reference.timesteps},
        "frechet_floor": evaluator.frechet_floor,
        "cells": cells,
    }


def _model_json(source: Source, requested: str, digest: str) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    return {"name": source.name, "asked": requested, "sha256": digest, "fp32_bytes": 4 * parameters}

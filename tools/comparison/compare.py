"""Compare recipes on one model at an equal budget of wall time: each experiment runs in a new process, then its artifact is evaluated.

Completed experiments are kept: an interrupted comparison continues, and one with further recipes or schemes runs only the new ones.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.network.family import SAMPLE
from edm_deploy.network.meta_model import meta_model
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts
from edm_deploy.pipelines.prompt_file import read_prompts
from edm_deploy.pipelines.source import Source, load_source
from edm_deploy.runtime.capabilities import capabilities_of
from edm_deploy.storage.directories import check_replaceable, new_directory, read_json, write_json
from edm_deploy_tools.common.child_process import run_measured
from edm_deploy_tools.common.console import Notify, bytes_of, finite, silent, time_words
from edm_deploy_tools.common.machine import machine, versions
from edm_deploy_tools.comparison.grid import Experiment, check_experiments, entries_of, experiments_of, schemes_of
from edm_deploy_tools.comparison.report import comparison_html, comparison_markdown
from edm_deploy_tools.evaluation.feature_network import features_of
from edm_deploy_tools.evaluation.frechet import frechet_distance
from edm_deploy_tools.evaluation.trajectory_error import (
    EvaluationSettings,
    ReferenceTrajectory,
    denoise_of_artifact,
    reference_trajectory,
    trajectory_error,
)

MARKER = "compare.json"
RESULTS, REPORT, TABLE = "results.json", "report.html", "table.md"
MADE, FIGURES, IMAGES = "made.json", "figures.json", "images.safetensors"
ARTIFACT, MEASURED = "artifact", "measured"
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
    prompts: Path | None = None
    settings: EvaluationSettings = dataclasses.field(default_factory=lambda: EvaluationSettings(samples=64))

    def to_json(self) -> dict[str, Any]:
        """All fields by name; `settings` is called `setup` in the files."""
        content = _json(self)
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
    check_replaceable(out, marker=MARKER)
    target = capabilities_of(request.backend) if request.backend else None
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
    notify(f"float model: {settings.samples} samples in {settings.steps} steps, twice")
    reference = reference_trajectory(source, settings)
    check_experiments(experiments, source, target, forward_seconds=reference.seconds, batch=settings.samples)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {"model": model, "model_sha256": digest, "asked": request.to_json()})
    evaluator = ArtifactEvaluator(reference)
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


class ArtifactEvaluator:
    """Evaluates artifacts against trajectories of the float model.

    Args:
        reference: The trajectories.

    Attributes:
        frechet_floor: Frechet distance of two sets of the float model's samples with different noise: the resolution at this number of samples.
    """

    def __init__(self, reference: ReferenceTrajectory) -> None:
        self.reference = reference
        self.images = self._visible(reference.images)
        self.features = features_of(self.images)
        settings = dataclasses.replace(reference.settings, seed=reference.settings.seed + 1)
        other = reference_trajectory(reference.source, settings)
        self.frechet_floor = frechet_distance(features_of(self._visible(other.images)), self.features)

    def figures(self, directory: Path, notify: Notify) -> dict[str, Any]:
        """Figures of the artifact of an experiment, measured once for each settings; `failed` with the reason if its samples are not finite."""
        settings = _json(self.reference.settings)
        artifact = Artifact.load(directory / ARTIFACT)
        try:
            cached = read_json(directory / MEASURED / FIGURES, what="measured")
            if cached["setup"] == settings and cached["artifact"] == artifact.digest and (directory / MEASURED / IMAGES).is_file():
                return cached
        except (ArtifactError, KeyError):
            pass
        error = trajectory_error(denoise_of_artifact(artifact, self.reference.conditioning), self.reference)
        images = self._visible(error.images)
        if not bool(images.isfinite().all()):
            notify("  failed: samples are not finite")
            return {"failed": "The samples are not finite: the quantized model diverges. Use more bits."}
        figures = {
            "setup": settings,
            "artifact": artifact.digest,
            "noise_error": error.noise_error,
            "noise_error_by_step": list(error.noise_errors),
            "psnr_db": error.psnr,
            "frechet": frechet_distance(features_of(images), self.features),
            "bytes": bytes_of(directory / ARTIFACT),
            "integer_share": integer_share(artifact, self.reference.timesteps),
            "steps_done": artifact.provenance.get("steps_done"),
            "quantizing_seconds": artifact.provenance.get("wall_seconds"),
        }
        with new_directory(directory / MEASURED, marker=FIGURES) as temporary:
            save_file({"images": images.half().contiguous()}, temporary / IMAGES)
            write_json(temporary / FIGURES, figures)
        notify(f"  noise error {error.noise_error:.4f}, PSNR {error.psnr:.1f} dB, Frechet {figures['frechet']:.3g}")
        return figures

    def _visible(self, images: Tensor) -> Tensor:
        return self.reference.decoder.visible(images, self.reference.images).clamp(-1, 1)


def integer_share(artifact: Artifact, timesteps: Sequence[float]) -> float:
    """Share, 0 to 1, of the multiply-accumulates of all Conv2d and Linear layers whose weights and inputs are both integer codes.

    The two products of attention are always in floating point and are not counted. At timesteps with float activations nothing is integer.

    Args:
        artifact: The quantized model.
        timesteps: Timesteps of the sampling steps.
    """
    family, total, integer = artifact.family_object, 0, 0
    model = meta_model(family, artifact.config, artifact.structure)

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total, integer
            macs = output.numel() * layer.weight[0].numel()  # type: ignore[operator, index]  # of a Conv2d or a Linear
            total += macs
            site = artifact.sites.get(name)
            integer += macs if site is not None and site.activation is not None else 0

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count(name))
    inputs = {SAMPLE: torch.zeros(1, *family.sample_shape(artifact.config)), "timestep": torch.zeros(1)}
    inputs |= family.random_conditioning(artifact.config, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        family.forward(model, {name: value.to("meta") for name, value in inputs.items()})
    quantized_steps = 1.0
    if artifact.relaxed is not None:
        at = torch.tensor([round(timestep) for timestep in timesteps]).clamp(max=len(artifact.relaxed) - 1)
        quantized_steps = float((artifact.relaxed[at] == 0).double().mean())
    return quantized_steps * integer / total


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


def _json(value: Any) -> dict[str, Any]:  # a dataclass instance
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value), default=str))
    return content

"""Recipes side by side on one model at an equal budget of wall time: each cell made by a process of its own, then judged, then one table of all.

What stands is kept: a comparison that was interrupted goes on where it was, and one with more recipes or schemes makes only those.
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

from calibration.data.prompts import prompts_of
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.network.family import SAMPLE, meta_model
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts
from edm_deploy.pipelines.source import Source, load_source
from edm_deploy.runtime.capabilities import capabilities_of
from edm_deploy.storage.directories import check_replaceable, new_directory, read_json, write_json
from edm_deploy_tools.common.child_process import run_measured
from edm_deploy_tools.common.console import bytes_of, time_words
from edm_deploy_tools.common.machine import machine, versions
from edm_deploy_tools.comparison.grid import Experiment, cells_of, check_cells, entries_of, schemes_of
from edm_deploy_tools.comparison.report import html_of, markdown_of
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
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What is compared, as the command line gives it.

    Attributes:
        recipes: `all`, or entries with commas.
        bits: Schemes with commas.
        budget: Seconds for each cell that trains.
        presets: Preset or TOML file by recipe.
        rows: Of the tables.
        seeds: Runs of each recipe that trains.
        backend: Refuse what it cannot carry; None refuses nothing.
        prompts: File of what models that take text are told while they are quantized; None is the built-in list.
        setup: What is measured on.
    """

    recipes: str
    bits: str
    budget: float
    presets: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: int = 20
    seeds: int = 1
    backend: str | None = None
    prompts: Path | None = None
    setup: EvaluationSettings = dataclasses.field(default_factory=lambda: EvaluationSettings(samples=64))


def compare(model: str, out: Path, asked: ComparisonRequest, *, say: Say | None = None) -> dict[str, Any]:
    """Run a comparison, or go on with one; results.json, table.md and report.html in `out` are written anew after every cell.

    Args:
        model: A local diffusers directory or a hub id.
        out: Directory of the comparison; what it holds already is kept.
        asked: Recipes, schemes, budget.
        say: Told what is being done.

    Returns:
        What results.json holds.

    Raises:
        UnsupportedError, InputError, ArtifactError: Whatever can be refused is refused before anything is quantized.
    """
    say = say or (lambda text: None)
    check_replaceable(out, marker=MARKER)
    target = capabilities_of(asked.backend) if asked.backend else None
    if asked.setup.samples < 2:
        raise InputError(f"--samples {asked.setup.samples}: a Frechet distance needs at least 2. Set a larger --samples.")
    entries = entries_of(asked.recipes, asked.presets)
    cells = cells_of(entries, schemes_of(asked.bits), rows=asked.rows, seeds=asked.seeds, budget=asked.budget)
    source = load_source(model)
    prompts = () if asked.prompts is None else prompts_of(asked.prompts)
    if prompts:
        check_takes_prompts(source)
    digest = source.digest()
    say(f"float model: {asked.setup.samples} samples in {asked.setup.steps} steps, twice")
    reference = reference_trajectory(source, asked.setup)
    check_cells(cells, source, target, forward_seconds=reference.seconds, batch=asked.setup.samples)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {"model": model, "model_sha256": digest, "asked": _json(asked)})
    judge = Judge(reference)
    figures: dict[Path, dict[str, Any]] = {}
    for number, cell in enumerate(cells, start=1):
        say(f"{number}/{len(cells)} {cell.scheme} {cell.entry.label}" + (f", seed {cell.seed}" if cell.seed else ""))
        place = out / cell.folder
        made = make(cell, model, place, cell.identity(digest, prompts), asked, say)
        figures[cell.folder] = made if "failed" in made else made | judge.figures(place, say)
        results = _results(model, digest, asked, reference, judge, cells[:number], figures)
        write(results, judge, out, cells[:number])
    return results


def make(cell: Experiment, model: str, place: Path, identity: dict[str, Any], asked: ComparisonRequest, say: Say) -> dict[str, Any]:
    """Quantize one cell in a process of its own, unless it stands already: its wall time and peak memory, or why it failed."""
    if (kept := _made(place, identity)) is not None:
        return kept
    for leftover in (ARTIFACT, ARTIFACT + ".checkpoint", MEASURED):
        shutil.rmtree(place / leftover, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    (place / MADE).unlink(missing_ok=True)
    found = run_measured(cell.command(model, (place / ARTIFACT).absolute(), prompts=asked.prompts), cwd=Path.cwd())
    if found.returncode:
        say(f"  failed: {found.last_line}")
        return {"identity": identity, "failed": found.last_line.removeprefix("Error: ")}
    made = {"identity": identity, "seconds": found.seconds, "peak_bytes": found.peak_bytes}
    temporary = place / f".{MADE}"
    write_json(temporary, made)
    os.replace(temporary, place / MADE)
    say(f"  made in {time_words(found.seconds)}")
    return made


def _made(place: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a cell that stands, made alike; None where it must be made."""
    try:
        made = read_json(place / MADE, what="cell")
        Artifact.load(place / ARTIFACT)
    except ArtifactError:
        return None
    return made if made.get("identity") == json.loads(json.dumps(identity)) else None


class Judge:
    """Measures artifacts against one walk of the float model.

    Args:
        reference: The walk.

    Attributes:
        frechet_floor: The distance of two sets of the float model's own samples, of different noise: what so few samples cannot tell from 0.
    """

    def __init__(self, reference: ReferenceTrajectory) -> None:
        self.reference = reference
        self.images = self._visible(reference.images)
        self.features = features_of(self.images)
        other = reference_trajectory(reference.source, dataclasses.replace(reference.setup, seed=reference.setup.seed + 1))
        self.frechet_floor = frechet_distance(features_of(self._visible(other.images)), self.features)

    def figures(self, place: Path, say: Say) -> dict[str, Any]:
        """Figures of the artifact of a cell; measured once for each setup."""
        setup = _json(self.reference.setup)
        artifact = Artifact.load(place / ARTIFACT)
        try:
            kept = read_json(place / MEASURED / FIGURES, what="measured")
            if kept["setup"] == setup and kept["artifact"] == artifact.digest and (place / MEASURED / IMAGES).is_file():
                return kept
        except (ArtifactError, KeyError):
            pass
        far = trajectory_error(denoise_of_artifact(artifact, self.reference.conditioning), self.reference)
        images = self._visible(far.images)
        figures = {
            "setup": setup,
            "artifact": artifact.digest,
            "noise_error": far.noise_error,
            "noise_error_by_step": list(far.noise_errors),
            "psnr_db": far.psnr,
            "frechet": frechet_distance(features_of(images), self.features),
            "bytes": bytes_of(place / ARTIFACT),
            "integer_share": integer_share(artifact, self.reference.timesteps),
            "steps_done": artifact.provenance.get("steps_done"),
            "quantizing_seconds": artifact.provenance.get("wall_seconds"),
        }
        with new_directory(place / MEASURED, marker=FIGURES) as directory:
            save_file({"images": images.half().contiguous()}, directory / IMAGES)
            write_json(directory / FIGURES, figures)
        say(f"  noise error {far.noise_error:.4f}, PSNR {far.psnr:.1f} dB, Frechet {figures['frechet']:.3g}")
        return figures

    def _visible(self, images: Tensor) -> Tensor:
        return self.reference.decoder.visible(images, self.reference.images).clamp(-1, 1)


def integer_share(artifact: Artifact, timesteps: Sequence[float]) -> float:
    """Share, 0 to 1, of the multiply-accumulates of all Conv2d and Linear layers that are of integer codes on both sides.

    Attention's two products are in floating point everywhere and are not counted. At timesteps where activations are left unrounded nothing is integer.

    Args:
        artifact: What would run.
        timesteps: Of the walk.
    """
    family, total, integer = artifact.family_object, 0, 0
    model = meta_model(family, artifact.config, artifact.structure)

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total, integer
            macs = output.numel() * layer.weight[0].numel()  # type: ignore[operator, index]  # a Conv2d's or a Linear's
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
    rounded = 1.0
    if artifact.relaxed is not None:
        at = torch.tensor([round(timestep) for timestep in timesteps]).clamp(max=len(artifact.relaxed) - 1)
        rounded = float((artifact.relaxed[at] == 0).double().mean())
    return rounded * integer / total


def write(results: dict[str, Any], judge: Judge, out: Path, cells: Sequence[Experiment]) -> None:
    """results.json, table.md and report.html."""
    images = {"float": judge.images[:SHOWN]}
    for cell in cells:
        path = out / cell.folder / MEASURED / IMAGES
        if path.is_file():
            images[str(cell.folder)] = load_file(path)["images"][:SHOWN].float()
    for name, text in (
        (RESULTS, json.dumps(results, indent=2) + "\n"),
        (TABLE, markdown_of(results)),
        (REPORT, html_of(results, images)),
    ):
        temporary = out / f".{name}"
        temporary.write_text(text)
        os.replace(temporary, out / name)


def _results(
    model: str,
    digest: str,
    asked: ComparisonRequest,
    reference: ReferenceTrajectory,
    judge: Judge,
    cells: Sequence[Experiment],
    figures: dict[Path, dict[str, Any]],
) -> dict[str, Any]:
    source: Source = reference.source
    rows = [
        {
            "recipe": cell.entry.label,
            "scheme": cell.scheme,
            "seed": cell.seed,
            "trains": cell.budget is not None,
            "folder": str(cell.folder),
        }
        | figures[cell.folder]
        for cell in cells
    ]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "model": {
            "name": source.name,
            "asked": model,
            "sha256": digest,
            "fp32_bytes": 4 * sum(p.numel() for p in source.model.parameters()),
        },
        "asked": _json(asked),
        "walk": {"scheduler": reference.scheduler, "guidance": reference.guidance, "timesteps": reference.timesteps},
        "frechet_floor": judge.frechet_floor,
        "cells": rows,
    }


def _json(value: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value), default=str))
    return content

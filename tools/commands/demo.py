"""The command `demo`: all stages with the shipped model. Each stage writes a directory; a directory that is up to date is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from calibration.run.checkpoint import holds_checkpoint
from calibration.run.options import Interrupted, RunOptions
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.pipelines.custom import UnconditionalPipeline, images_from_sample
from edm_deploy.pipelines.source import load_source
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import summary
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.directories import write_json
from edm_deploy_tools.commands.quantize_model import QuantizeRequest, checkpoint_of, quantize
from edm_deploy_tools.common import console
from edm_deploy_tools.common.assets import REFERENCE_MODEL
from edm_deploy_tools.common.build_options import build
from edm_deploy_tools.common.child_process import tied
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.common.recipe_settings import recipe_with
from edm_deploy_tools.evaluation.evaluate import HTML_NAME, JSON_NAME, evaluate_targets, open_targets
from edm_deploy_tools.evaluation.report import report_html
from edm_deploy_tools.evaluation.results import Report, final_samples, headline
from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings
from edm_deploy_tools.images.sample import grid_of, sample_images
from engines import backend_named

GRID_NAME = "grid.png"
PRESET = "demo"
IMAGES_IN_A_ROW = 8  # in grid.png


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """An engine of the demo.

    Attributes:
        name: Its directory is `engine-<name>`.
        backend: Name of the backend, as for build-engine.
        options: Options of the build.
        runs_here: Whether it can run on this machine; False for one that is built ahead of time for a GPU.
    """

    name: str
    backend: str
    options: BuildOptions = dataclasses.field(default_factory=BuildOptions)
    runs_here: bool = True


BUILDS = (
    EngineBuild(name="ort", backend="ort"),
    EngineBuild(name="openvino", backend="openvino"),
    EngineBuild(name="openvino-bf16", backend="openvino", options=BuildOptions(precision="bf16")),
    EngineBuild(name="cpu", backend="cpu"),
    EngineBuild(name="rtx3090", backend="trt-rtx", options=BuildOptions(gpu="rtx3090"), runs_here=False),
)


def run_demo(out: Path, bits: str) -> None:
    """Calibrate, fine-tune, export, build, sample, evaluate; writes report.html and grid.png into `out`.

    Args:
        out: Directory for all results.
        bits: Scheme, for example `W4A4`.

    Raises:
        InputError: `bits` is no scheme.
        Interrupted: Ctrl-C; the next call continues from there.
    """
    start = time.perf_counter()
    weight_bits, act_bits = scheme_bits(bits)
    work = out / f"w{weight_bits}a{act_bits}"
    flags = {"weight_bits": weight_bits, "act_bits": act_bits}
    tuned_recipe = recipe_with("efficientdm", preset=PRESET, flags=flags)
    plain_recipe = recipe_with("mse", flags=flags | {"rows": tuned_recipe.rows})

    _stage(1, "Calibrate (no training)")
    keep_or_make(
        work / "calibrated",
        lambda artifact: made_by(artifact, plain_recipe),
        lambda path: quantize(QuantizeRequest(model=str(REFERENCE_MODEL), out=path, recipe=plain_recipe)),
    )
    _stage(2, "Fine-tune against the float model, without data")
    tuned = keep_or_make(work / "finetuned", lambda artifact: made_by(artifact, tuned_recipe), lambda path: finetune(path, tuned_recipe))
    _stage(3, "Export to ONNX")
    export(work / "onnx", tuned)
    _stage(4, "Build engines")
    engines = [built for built in (build_one(work, tuned, entry) for entry in BUILDS) if built]
    _stage(5, "Sample")
    engines = [(path, entry) for path, entry in engines if not entry.runs_here or sample_one(path)]
    _stage(6, "Evaluate")
    report = measure(work, engines)
    write(report, out)
    console.print_table(f"Against the float model ({console.time_words(time.perf_counter() - start)} in total)", headline(report))
    console.wrote(out / HTML_NAME)
    console.wrote(out / GRID_NAME)


def scheme_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a scheme such as `W4A8`; InputError for another form."""
    match = re.fullmatch(r"[Ww](\d+)[Aa](\d+)", bits)
    if not match:
        raise InputError(f"--bits {bits!r}: expected a scheme such as W4A4 or W4A8.")
    return int(match[1]), int(match[2])


def keep_or_make(path: Path, is_current: Callable[[Artifact], bool], make: Callable[[Path], Artifact]) -> Artifact:
    """The artifact in `path` if it exists and is current; otherwise a new one."""
    try:
        existing = Artifact.load(path)
    except ArtifactError:
        existing = None
    if existing is not None and is_current(existing):
        console.say(f"{path} is kept from an earlier run")
        return existing
    artifact = make(path)
    console.wrote(path, f"artifact, {artifact.scheme}")
    return artifact


def made_by(artifact: Artifact, recipe: Any) -> bool:
    """Whether an artifact was made by this recipe with these settings."""
    settings = artifact.provenance.get("settings")
    return bool(artifact.provenance.get("recipe") == recipe.name and settings == json.loads(json.dumps(recipe.settings())))


def finetune(path: Path, recipe: Any) -> Artifact:
    """Fine-tune the shipped model, from the checkpoint of an interrupted demo if there is one with the same settings."""
    checkpoint = checkpoint_of(path)
    try:
        options = RunOptions(checkpoint=checkpoint, resume=holds_checkpoint(checkpoint))
        return quantize(QuantizeRequest(model=str(REFERENCE_MODEL), out=path, recipe=recipe, options=options))
    except Interrupted as err:
        raise Interrupted("Interrupted; completed stages are kept. Run edm-deploy demo again to continue.") from err
    except ArtifactError as err:
        if not checkpoint.is_dir():
            raise
        console.say(f"Starting again: {err}")  # the checkpoint has other settings or is damaged
        shutil.rmtree(checkpoint)
        return finetune(path, recipe)


def export(path: Path, artifact: Artifact) -> None:
    """Export the artifact, unless the directory holds its export."""
    if made_from(path, artifact, "onnx"):
        console.say(f"{path} is kept from an earlier run")
        return
    start = time.perf_counter()
    onnx_from_artifact(artifact, path)
    console.wrote(path, f"in {console.time_words(time.perf_counter() - start)}")


def build_one(work: Path, artifact: Artifact, entry: EngineBuild) -> tuple[Path, EngineBuild] | None:
    """Build one engine; None, with the reason printed, if its backend is not installed."""
    path = work / f"engine-{entry.name}"
    manifest = made_from(path, artifact, "engine")
    try:
        source = work / ("onnx" if backend_named(entry.backend).builds_from == "onnx" else "finetuned")
        manifest = manifest or build(source, path, backend=entry.backend, options=entry.options)
    except UnsupportedError as err:
        console.say(f"Skipped {entry.name}: {err}")
        return None
    console.wrote(path, f"{summary(manifest.plan)}; built in {console.time_words(float(manifest.build.get('seconds', 0)))}")
    return path, entry


def sample_one(engine: Path) -> bool:
    """Sample with one engine; False, with the reason printed, if what it needs to run is not installed, as the C++ compiler of `cpu`."""
    try:
        sampled = sample_images(engine, engine.with_name(engine.name.replace("engine", "images")))
    except UnsupportedError as err:
        console.say(f"Skipped {engine.name}: {err}")
        return False
    console.wrote(sampled.paths[0].parent, f"{sampled.count} images, {sampled.seconds_per_image:.3f} s each")
    return True


def made_from(path: Path, artifact: Artifact, kind: Literal["onnx", "engine"]) -> Manifest | None:
    """The manifest in `path` if it is complete and was made from this artifact, else None."""
    try:
        manifest = Manifest.read(path, kind=kind)
    except ArtifactError:
        return None
    return manifest if manifest.artifact == artifact.digest else None


def measure(work: Path, engines: Sequence[tuple[Path, EngineBuild]]) -> Report:
    """Evaluate both artifacts and every engine that can run here, and time these engines."""
    running = [(path, entry) for path, entry in engines if entry.runs_here]
    paths = [work / "calibrated", work / "finetuned", *(path for path, _ in running)]
    labels = ["calibrated", "fine-tuned", *(f"fine-tuned, {entry.name}" for _, entry in running)]
    targets = open_targets(paths, labels)
    source = load_source(str(REFERENCE_MODEL))
    report = evaluate_targets(targets, source, EvaluationSettings(), notify=lambda text: console.say(f"  {text}"))
    waiting = open_targets([path for path, entry in engines if not entry.runs_here])
    if not running:
        return dataclasses.replace(report, waiting=tuple(waiting))
    return dataclasses.replace(report, waiting=tuple(waiting), bench=tuple(bench_in_new_process([path for path, _ in running])))


def bench_in_new_process(engines: Sequence[Path]) -> list[Row]:
    """Rows of `edm-deploy bench` in a new process, because the passive OpenMP threads of this one would slow down the float baselines."""
    command = [
        sys.executable,
        "-m",
        "edm_deploy_tools.cli",
        "bench",
        *map(str, engines),
        "--against",
        "torch,torch-bf16",
        "--rounds",
        "10",
        "--json",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    finished = subprocess.run(tied(command), env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        console.say(f"Skipped the benchmark: {finished.stderr.strip()}")
        return []
    rows: list[Row] = json.loads(finished.stdout)["results"]
    return rows


def write(report: Report, out: Path) -> None:
    """Write report.json, report.html and grid.png."""
    write_json(out / JSON_NAME, report.to_json())
    (out / HTML_NAME).write_text(report_html(report))
    rows = {label: samples[:IMAGES_IN_A_ROW] for label, samples in final_samples(report)}
    labelled_rows(rows).save(out / GRID_NAME)


def labelled_rows(rows: Mapping[str, Tensor]) -> Image.Image:
    """One image with a row of samples for each label, which is written in front of it.

    Args:
        rows: Samples, float [B, C, H, W] in [-1, 1], by label.
    """
    strips = {
        label: grid_of(UnconditionalPipeline.numpy_to_pil(images_from_sample(samples)), columns=len(samples))
        for label, samples in rows.items()
    }
    font = ImageFont.load_default(size=17)
    margin, gap = 24 + max(int(font.getlength(label)) for label in strips), 10
    width = margin + max(strip.width for strip in strips.values()) + gap
    image = Image.new("RGB", (width, gap + sum(strip.height + gap for strip in strips.values())), "white")
    top = gap
    for label, strip in strips.items():
        ImageDraw.Draw(image).text((gap, top + strip.height / 2), label, fill="#1c2024", font=font, anchor="lm")
        image.paste(strip, (margin, top))
        top += strip.height + gap
    return image


def _stage(number: int, words: str) -> None:
    console.out().print(f"[bold]{number}/6 {words}[/bold]")

"""Quantize a model and save the artifact: the work that `calibrate` and `finetune` share."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

import calibration
from calibration.base_pass import Pass, check_passes
from calibration.recipe import Recipe
from calibration.run.checkpoint import check_not_overwritten, holds_checkpoint
from calibration.run.memory import needed_memory
from calibration.run.options import Progress, RunOptions
from edm_deploy.artifact.artifact import ARTIFACT, JSON_NAME, Artifact
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.network.meta_model import meta_model
from edm_deploy.pipelines.model_index import read_pipeline_config
from edm_deploy.pipelines.source import load_source, local_directory
from edm_deploy.runtime.capabilities import capabilities_of, check_scheme
from edm_deploy.storage.leftovers import INSIDE
from edm_deploy.storage.output_directory import check_output, replaces_contents
from edm_deploy_tools.common.console import progress
from edm_deploy_tools.images.tensorboard_report import TensorboardReport
from edm_deploy_tools.inspection.site_prices import site_prices


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """A quantization: which model, by which method, written to which directory.

    Attributes:
        model: A local diffusers directory or a hub id.
        out: Directory of the artifact.
        recipe: The recipe with its settings.
        options: Device, teacher's dtype, checkpoint. The checkpoint is removed once the artifact is saved.
        start: Artifact that training starts from; None calibrates.
        passes: Passes that the recipe is composed with, in this order.
        backend: Backend that must be able to execute the scheme; None checks nothing.
        low_memory: Whether float weights stay in their files until a layer runs.
        report: Folder for TensorBoard; None writes no report.
        force: Whether to start although the estimate exceeds the available memory.
    """

    model: str
    out: Path
    recipe: Recipe
    options: RunOptions = field(default_factory=RunOptions)
    start: Artifact | None = None
    passes: Sequence[Pass] = ()
    backend: str | None = None
    low_memory: bool = False
    force: bool = False
    report: Path | None = None


def quantize(request: QuantizeRequest) -> Artifact:
    """Quantize a diffusers model and save the artifact; every check that needs no training comes before the training.

    Raises:
        ArtifactError, InputError, UnsupportedError: As load_source, calibration.fit and Artifact.save.
    """
    recipe, options, out = request.recipe, request.options, request.out
    options.processes.after_first(lambda: _check(request))  # which may complete what a killed run left
    source = load_source(request.model, low_memory=request.low_memory)
    if request.report is not None:
        if not recipe.distills:
            raise InputError(
                f"--report-to: recipe {recipe.name!r} does not train the whole network, so that there is nothing to report. Leave it out."
            )
        options = replace(options, report=TensorboardReport(request.report, source) if options.processes.writes else _Unseen())
    with progress() if options.processes.writes else nullcontext(_Unseen()) as show:
        artifact = calibration.fit(
            source, recipe, options, passes=request.passes, start=request.start, on_progress=show, prices=site_prices
        )
    if isinstance(options.report, TensorboardReport):
        options.report.close()
    if options.processes.writes:
        artifact.save(out)
        if options.checkpoint is not None:
            shutil.rmtree(options.checkpoint, ignore_errors=True)
    options.processes.close()
    return artifact


def _check(request: QuantizeRequest) -> None:
    recipe, options, out = request.recipe, request.options, request.out
    check_passes(request.passes, recipe)
    if request.backend is not None:
        check_scheme(capabilities_of(request.backend), recipe.weight_bits, recipe.act_bits)
    check_output(out, kind=ARTIFACT)
    check_not_overwritten(options, finished_too=True)
    if options.resume and options.checkpoint is not None and not holds_checkpoint(options.checkpoint):
        raise ArtifactError(f"{options.checkpoint} holds no checkpoint to resume. Start without --resume, or check --out.")
    parameters = _parameters(request.model)
    check_output(out, kind=ARTIFACT, needed_bytes=parameters * recipe.weight_bits // 8)
    if not request.force:
        _check_memory(request, parameters)


class _Unseen:
    """Progress and report of another process than the first."""

    def __call__(self, progress: Progress) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def samples(self, step: int, student: Tensor, teacher: Tensor) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Start:
    """What training starts from.

    Attributes:
        model: A local diffusers directory or a hub id.
        artifact: None where training starts from the float model.
    """

    model: str
    artifact: Artifact | None


def start_of(model: str, path: Path | None) -> Start:
    """The float model and the artifact of `finetune MODEL --from ARTIFACT`, or of `finetune ARTIFACT`, whose provenance names the model.

    Raises:
        ArtifactError: The artifact is missing or damaged.
        InputError: Two artifacts, or one that does not name its model.
    """
    if not (Path(model) / JSON_NAME).is_file():
        return Start(model=model, artifact=None if path is None else Artifact.load(path))
    if path is not None:
        raise InputError(f"{model} is an artifact, and --from names {path}. Name the float model and --from, or only one artifact.")
    artifact = Artifact.load(model)
    source = artifact.provenance.get("source")
    if not isinstance(source, str):
        raise InputError(f"{model} does not record which float model it was made of. Name the model, and --from {model}.")
    return Start(model=source, artifact=artifact)


def checkpoint_of(out: Path) -> Path:
    """Where `finetune` keeps its checkpoint: next to `out`; in it, where that is a mount point or the working directory."""
    return out / f"{INSIDE}checkpoint" if replaces_contents(out) else out.with_name(out.name + ".checkpoint")


def _parameters(model: str) -> int:
    config = read_pipeline_config(local_directory(model), model)
    return sum(value.numel() for value in meta_model(config.family_object, config.config).parameters())


def _check_memory(request: QuantizeRequest, parameters: int) -> None:
    recipe, low_memory = request.recipe, request.low_memory
    rotates = recipe.rotate != "off"
    needed = needed_memory(parameters, trains=recipe.trains, low_memory=low_memory, rotates=rotates, cached=recipe.cached_bytes)
    needed *= request.options.processes.local_size
    available = psutil.virtual_memory().available
    if needed > available:
        remedy = (
            "Free memory, or start anyway with --force" if low_memory else "Use --low-memory, free memory, or start anyway with --force"
        )
        raise InputError(
            f"Quantizing {request.model} needs about {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are available. {remedy}."
        )


def run_options(*, teacher_dtype: str | None = None, **options: Any) -> RunOptions:
    """RunOptions from the command line; a `teacher_dtype` of None keeps the default."""
    if teacher_dtype is not None:
        options["teacher_dtype"] = teacher_dtype
    return RunOptions(**options)


def compute_dtypes(mixed_precision: str | None, teacher_dtype: str | None, overrides: Sequence[str]) -> tuple[str | None, str | None]:
    """The recipe's setting `compute` and the teacher's dtype for `--mixed-precision`; None leaves each as it is.

    Raises:
        InputError: Another option decides one of them too.
    """
    if mixed_precision is None:
        return None, teacher_dtype
    others = ["--teacher-dtype"] if teacher_dtype is not None else []
    others += [f"--set {text}" for text in overrides if text.partition("=")[0].strip() == "compute"]
    if others:
        raise InputError(f"--mixed-precision {mixed_precision} and {others[0]} decide the same. Leave one of them out.")
    return ("bf16", "bf16-autocast") if mixed_precision == "bf16" else ("fp32", "fp32")

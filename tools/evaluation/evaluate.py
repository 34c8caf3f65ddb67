"""Evaluate artifacts and engines against the float model that they were made from; writes report.json and report.html."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import engines
from edm_deploy.adapters.fuse import with_loras
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.pipelines.source import Source, load_source
from edm_deploy.runtime.backend import SiteTestCase
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.directories import write_json
from edm_deploy.storage.leftovers import scratch_directory
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory
from edm_deploy_tools.common.console import Notify, silent
from edm_deploy_tools.common.loras import read_loras
from edm_deploy_tools.common.machine import machine, versions
from edm_deploy_tools.evaluation.denoisers import denoise_of_artifact, denoise_of_engine
from edm_deploy_tools.evaluation.image_metrics import ImageMetrics, MetricRequest
from edm_deploy_tools.evaluation.report import report_html
from edm_deploy_tools.evaluation.results import EvaluationTarget, Report, Result
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_trajectory, site_statistics
from edm_deploy_tools.evaluation.trajectory_error import (
    EvaluationSettings,
    ReferenceTrajectory,
    reference_trajectory,
    trajectory_error,
)
from edm_deploy_tools.inspection.describe import kind_of

JSON_NAME = "report.json"
REPORT = DirectoryKind("a report", JSON_NAME, ("report.html",))
HTML_NAME = "report.html"


def evaluate_paths(
    paths: Sequence[Path],
    out: Path,
    *,
    reference: str | None = None,
    settings: EvaluationSettings | None = None,
    device: str | None = None,
    low_memory: bool = False,
    metrics: MetricRequest | None = None,
    notify: Notify = silent,
) -> Report:
    """Evaluate artifacts and engines, and write report.json and report.html into directory `out`.

    Args:
        paths: Artifact and engine directories. An engine is compared site by site with the artifact that it was built from, if that is given too.
        out: Output directory, written completely or not at all.
        reference: The float model; None is the model that the first artifact was made from.
        settings: Samples, steps, seeds, guidance, prompts.
        device: Where engines run; None is the default device of each engine's backend.
        low_memory: Whether the float model's weights stay in their files until a layer runs.
        metrics: Metrics of the final images to measure in addition; None measures none.
        notify: Called with a line of text before each measurement.

    Raises:
        ArtifactError: A path is neither an artifact nor an engine, or the float model is not found.
        InputError: Prompts or a guidance scale for a model that takes none, or a LoRA that does not belong to it or has no rank slots in an engine.
        UnsupportedError: An engine cannot run on this machine.
    """
    check_output(out, kind=REPORT)
    targets = open_targets(paths)
    source = load_source(reference or float_model_of(targets), low_memory=low_memory)
    report = evaluate_targets(targets, source, settings or EvaluationSettings(), device=device, metrics=metrics, notify=notify)
    write_report(report, out)
    return report


def open_targets(paths: Sequence[Path], labels: Sequence[str] = ()) -> list[EvaluationTarget]:
    """Open artifacts and engines; each engine is linked to the artifact that it was built from, if that is among them."""
    kinds = [kind_of(str(path)) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if not path.exists():
            raise ArtifactError(f"{path} does not exist; evaluate takes artifacts and engines. Check the path.")
        if kind not in ("artifact", "engine"):
            raise ArtifactError(f"{path} is {_with_article(kind)}; evaluate takes artifacts and engines.{_remedy(kind, path)}")
    artifacts = {path: Artifact.load(path) for path, kind in zip(paths, kinds, strict=True) if kind == "artifact"}
    by_digest = {artifact.digest: artifact for artifact in artifacts.values()}
    targets = []
    for path, label in zip(paths, labels or unique_labels(paths), strict=True):
        engine = None if path in artifacts else Manifest.read(path, kind="engine")
        artifact = artifacts.get(path) or (by_digest.get(engine.artifact) if engine else None)
        targets.append(EvaluationTarget(label=label, path=path, artifact=artifact, engine=engine))
    return targets


def unique_labels(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path if two have the same last part."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def float_model_of(targets: Sequence[EvaluationTarget]) -> str:
    """The float model that the first artifact was made from, by its provenance.

    Raises:
        ArtifactError: No artifact records one, or it no longer exists.
    """
    recorded = [
        str(target.artifact.provenance["source"]) for target in targets if target.artifact and target.artifact.provenance.get("source")
    ]
    if not recorded:
        raise ArtifactError(f"{targets[0].path} does not record the float model that it was made from. Name it with --reference MODEL.")
    if Path(recorded[0]).is_absolute() and not Path(recorded[0]).exists():
        raise ArtifactError(
            f"{targets[0].path} was made from {recorded[0]}, which does not exist. Name the float model with --reference MODEL."
        )
    return recorded[0]


def evaluate_targets(
    targets: Sequence[EvaluationTarget],
    source: Source,
    settings: EvaluationSettings,
    *,
    device: str | None = None,
    metrics: MetricRequest | None = None,
    notify: Notify = silent,
) -> Report:
    """Measure each target against the float model; engines run on `device`, or on the default device of their backend."""
    for target in targets:
        check_same_model(target, source)
    notify(f"float model: {settings.trajectories} samples, {settings.steps} steps")
    trajectory = reference_trajectory(source, settings)
    decoder = trajectory.decoder
    against = None if metrics is None else ImageMetrics(metrics, decoder.visible(trajectory.images, trajectory.images))
    results = []
    with scratch_directory("evaluate") as scratch:
        cases = SiteTestCases(trajectory, scratch)
        for target in targets:
            notify(f"{target.label} ({target.kind}, {target.scheme})")
            results.append(evaluate_engine(target, trajectory, cases, device) if target.engine else evaluate_artifact(target, trajectory))
    if against is not None:
        results = [replace(each, metrics=against.of(decoder.visible(each.error.images, trajectory.images))) for each in results]
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return Report(reference=source, trajectory=trajectory, results=tuple(results), date=now, machine=machine(), versions=versions())


def evaluate_artifact(target: EvaluationTarget, trajectory: ReferenceTrajectory) -> Result:
    """Evaluate an artifact in the reference executor, with statistics of each site."""
    assert target.artifact is not None  # the caller chose an artifact
    artifact, loras = target.artifact, trajectory.settings.loras
    if loras:
        artifact = with_loras(artifact, read_loras(artifact, loras))
    error = trajectory_error(denoise_of_artifact(artifact, trajectory.conditioning), trajectory)
    return Result(target=target, error=error, statistics=tuple(site_statistics(target.artifact, trajectory)))


class SiteTestCases:
    """Records of every site in the reference executor, cached by artifact and input dtype so that the engines of one artifact share them."""

    def __init__(self, trajectory: ReferenceTrajectory, scratch: Path) -> None:
        self.trajectory, self.scratch = trajectory, scratch
        self.cached: dict[tuple[str, torch.dtype], SiteTestCase] = {}

    def of(self, artifact: Artifact, engine: Manifest) -> SiteTestCase:
        """The records that an engine of `artifact` is compared with."""
        dtype = engines.backend_named(str(engine.backend)).site_dtype(engine)
        key = engine.artifact, dtype
        if key not in self.cached:
            self.cached[key] = cut_from_trajectory(artifact, self.trajectory, self.scratch / f"cut-{len(self.cached)}", dtype=dtype)
        return self.cached[key]


def evaluate_engine(target: EvaluationTarget, trajectory: ReferenceTrajectory, cases: SiteTestCases, device: str | None) -> Result:
    """Evaluate an engine, with its agreement site by site if its artifact is known."""
    assert target.engine is not None  # the caller chose an engine
    denoise = denoise_of_engine(target.path, trajectory.conditioning, device=device, loras=trajectory.settings.loras)
    error = trajectory_error(denoise, trajectory)
    if target.artifact is None:
        note = "Agreement with the reference was not measured: give the artifact that the engine was built from as well."
        return Result(target=target, error=error, notes=(note,))
    try:
        sites = agreement(cases.of(target.artifact, target.engine), target.engine, device=device)
        return Result(target=target, error=error, agreement=tuple(sites))
    except UnsupportedError as err:
        return Result(target=target, error=error, notes=(f"Agreement with the reference was not measured: {err}",))


def check_same_model(target: EvaluationTarget, source: Source) -> None:
    """Raises ArtifactError if a target has another architecture than the float model."""
    holder = target.engine or target.artifact
    assert holder is not None  # an artifact or an engine is always set
    if holder.family != source.family:
        raise ArtifactError(
            f"{target.path} is a {holder.family}, {source.name} a {source.family}. Name the float model that it was made from with --reference."
        )
    for key, value in holder.config.items():
        if key in source.config and source.config[key] != value:
            raise ArtifactError(
                f"{target.path} has {key}={value!r}, {source.name} has {source.config[key]!r}: not the model that it was made from. "
                "Name that one with --reference."
            )


def write_report(report: Report, out: Path) -> None:
    """Write report.json and report.html into directory `out`, completely or not at all."""
    with new_directory(out, kind=REPORT) as directory:
        write_json(directory / JSON_NAME, report.to_json())
        (directory / HTML_NAME).write_text(report_html(report))


def _with_article(kind: str) -> str:
    return {"model": "a float model", "onnx": "an ONNX directory"}.get(kind, f"a {kind}")


def _remedy(kind: str, path: Path) -> str:
    return f" Run edm-deploy build-engine {path} first." if kind == "onnx" else " Run edm-deploy calibrate first."

"""Judge artifacts and engines against the float model that they were made from: figures in report.json, pictures in report.html."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import engines
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.pipelines.source import Source, load_source
from edm_deploy.runtime.backend import SiteTestCase
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.directories import check_replaceable, new_directory, write_json
from edm_deploy.storage.leftovers import scratch_directory
from edm_deploy_tools.common.machine import machine, versions
from edm_deploy_tools.evaluation.report import html_of
from edm_deploy_tools.evaluation.results import EvaluationTarget, Report, Result
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_at_sites, statistics
from edm_deploy_tools.evaluation.trajectory_error import (
    EvaluationSettings,
    ReferenceTrajectory,
    denoise_of_artifact,
    denoise_of_engine,
    reference_trajectory,
    trajectory_error,
)
from edm_deploy_tools.inspection.describe import kind_of

JSON_NAME = "report.json"
HTML_NAME = "report.html"
Say = Callable[[str], None]


def evaluate_paths(
    paths: Sequence[Path],
    out: Path,
    *,
    reference: str | None = None,
    setup: EvaluationSettings | None = None,
    device: str | None = None,
    low_memory: bool = False,
    say: Say | None = None,
) -> Report:
    """Judge artifacts and engines, and write report.json and report.html into directory `out`.

    Args:
        paths: Artifact and engine directories; an engine is compared site by site with the artifact among them that it was built from.
        out: Directory to write, whole or not at all.
        reference: The float model; None takes the one that the first artifact was made from.
        setup: Samples, steps, seed, guidance, prompts.
        device: Where engines run; None is where the backend of each runs.
        low_memory: Leave the float model's weights in their files until a layer runs.
        say: Told what is being measured.

    Raises:
        ArtifactError: A path is neither, or the float model is not found.
        InputError: The model takes no prompts, or is not guided.
        UnsupportedError: An engine cannot run on this machine.
    """
    check_replaceable(out, marker=JSON_NAME)
    subjects = open_subjects(paths)
    source = load_source(reference or reference_of(subjects), low_memory=low_memory)
    report = evaluate_targets(subjects, source, setup or EvaluationSettings(), device=device, say=say)
    write_report(report, out)
    return report


def open_subjects(paths: Sequence[Path], labels: Sequence[str] = ()) -> list[EvaluationTarget]:
    """Artifacts and engines with the artifact that each was built from, where it is among them."""
    kinds = [kind_of(str(path)) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if not path.exists():
            raise ArtifactError(f"{path} does not exist; evaluate takes artifacts and engines. Check the path.")
        if kind not in ("artifact", "engine"):
            raise ArtifactError(f"{path} is {_a(kind)}; evaluate takes artifacts and engines.{_mend(kind, path)}")
    artifacts = {path: Artifact.load(path) for path, kind in zip(paths, kinds, strict=True) if kind == "artifact"}
    by_digest = {artifact.digest: artifact for artifact in artifacts.values()}
    subjects = []
    for path, label in zip(paths, labels or unique_labels(paths), strict=True):
        engine = None if path in artifacts else Manifest.read(path, kind="engine")
        artifact = artifacts.get(path) or (by_digest.get(engine.artifact) if engine else None)
        subjects.append(EvaluationTarget(label=label, path=path, artifact=artifact, engine=engine))
    return subjects


def unique_labels(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two would be the same."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def reference_of(subjects: Sequence[EvaluationTarget]) -> str:
    """The float model that the first artifact was made from, by its provenance.

    Raises:
        ArtifactError: No artifact names one that is still there.
    """
    named = [
        str(subject.artifact.provenance["source"]) for subject in subjects if subject.artifact and subject.artifact.provenance.get("source")
    ]
    if not named:
        raise ArtifactError(f"{subjects[0].path} does not say which float model it was made from. Name it with --reference MODEL.")
    if Path(named[0]).is_absolute() and not Path(named[0]).exists():
        raise ArtifactError(
            f"{subjects[0].path} was made from {named[0]}, which is not there. Name the float model with --reference MODEL."
        )
    return named[0]


def evaluate_targets(
    subjects: Sequence[EvaluationTarget], source: Source, setup: EvaluationSettings, *, device: str | None = None, say: Say | None = None
) -> Report:
    """Measure each subject against the float model; engines on `device`, or where their backends run."""
    say = say or (lambda text: None)
    for subject in subjects:
        check_same_model(subject, source)
    say(f"float model: {setup.samples} samples, {setup.steps} steps")
    reference = reference_trajectory(source, setup)
    results = []
    with scratch_directory("evaluate") as scratch:
        cuts = Cuts(reference, scratch)
        for subject in subjects:
            say(f"{subject.label} ({subject.kind}, {subject.scheme})")
            results.append(evaluate_engine(subject, reference, cuts, device) if subject.engine else evaluate_artifact(subject, reference))
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return Report(reference=source, walk=reference, results=tuple(results), date=now, machine=machine(), versions=versions())


def evaluate_artifact(subject: EvaluationTarget, reference: ReferenceTrajectory) -> Result:
    """An artifact, computed by the reference executor, with each site's statistics."""
    assert subject.artifact is not None  # an artifact subject holds it
    far = trajectory_error(denoise_of_artifact(subject.artifact, reference.conditioning), reference)
    return Result(subject=subject, distance=far, statistics=tuple(statistics(subject.artifact, reference)))


class Cuts:
    """What the reference makes of every site alone, by artifact and rounding of the inputs, each made once: the engines of one artifact share it."""

    def __init__(self, reference: ReferenceTrajectory, scratch: Path) -> None:
        self.reference, self.scratch = reference, scratch
        self.made: dict[tuple[str, torch.dtype], SiteTestCase] = {}

    def of(self, artifact: Artifact, engine: Manifest) -> SiteTestCase:
        """The cut that an engine of `artifact` is compared on."""
        dtype = engines.backend_named(str(engine.backend)).site_dtype(engine)
        key = engine.artifact, dtype
        if key not in self.made:
            self.made[key] = cut_at_sites(artifact, self.reference, self.scratch / f"cut-{len(self.made)}", dtype=dtype)
        return self.made[key]


def evaluate_engine(subject: EvaluationTarget, reference: ReferenceTrajectory, cuts: Cuts, device: str | None) -> Result:
    """An engine, with its agreement site by site where its artifact is known."""
    assert subject.engine is not None  # an engine subject holds it
    far = trajectory_error(denoise_of_engine(subject.path, reference.conditioning, device=device), reference)
    if subject.artifact is None:
        note = "Agreement with the reference was not measured: give the artifact that the engine was built from beside it."
        return Result(subject=subject, distance=far, notes=(note,))
    try:
        found = agreement(cuts.of(subject.artifact, subject.engine), subject.engine, device=device)
        return Result(subject=subject, distance=far, agreement=tuple(found))
    except UnsupportedError as err:
        return Result(subject=subject, distance=far, notes=(f"Agreement with the reference was not measured: {err}",))


def check_same_model(subject: EvaluationTarget, source: Source) -> None:
    """Raises ArtifactError where a subject was not made from a model of this architecture."""
    holder = subject.engine or subject.artifact
    assert holder is not None  # one of the two is there
    if holder.family != source.family:
        raise ArtifactError(
            f"{subject.path} is a {holder.family}, {source.name} a {source.family}. Name its own float model with --reference."
        )
    for key, value in holder.config.items():
        if key in source.config and source.config[key] != value:
            raise ArtifactError(
                f"{subject.path} has {key}={value!r}, {source.name} has {source.config[key]!r}: not the model that it was made from. "
                "Name that one with --reference."
            )


def write_report(report: Report, out: Path) -> None:
    """report.json and report.html in directory `out`, whole or not at all."""
    with new_directory(out, marker=JSON_NAME) as directory:
        write_json(directory / JSON_NAME, report.to_json())
        (directory / HTML_NAME).write_text(html_of(report))


def _a(kind: str) -> str:
    return {"model": "a float model", "onnx": "an ONNX directory"}.get(kind, f"a {kind}")


def _mend(kind: str, path: Path) -> str:
    return f" Run edm-deploy build-engine {path} first." if kind == "onnx" else " Run edm-deploy calibrate first."

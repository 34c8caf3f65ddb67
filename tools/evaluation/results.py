"""Results of an evaluation, as tables for the console, report.json and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.capabilities import CAPABILITIES, plan_layers, summary
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.common.console import Row, bytes_of, finite
from edm_deploy_tools.evaluation.site_agreement import SiteAgreement, SiteStatistics
from edm_deploy_tools.evaluation.trajectory_error import ReferenceTrajectory, TrajectoryError


@dataclass(frozen=True, kw_only=True)
class EvaluationTarget:
    """An artifact or an engine to evaluate.

    Attributes:
        label: Name in the report.
        path: An artifact or engine directory.
        artifact: The artifact, or the one that the engine was built from if it is known.
        engine: Manifest of the engine; None for an artifact.
    """

    label: str
    path: Path
    artifact: Artifact | None
    engine: Manifest | None

    @property
    def kind(self) -> Literal["artifact", "engine"]:
        """Whether this is an artifact or an engine."""
        return "engine" if self.engine else "artifact"

    @property
    def bytes(self) -> int:
        """Size on disk: of the artifact's directory, or of the engine without text encoders and VAE in the same directory."""
        return int(self.engine.build.get("engine_bytes") or bytes_of(self.path)) if self.engine else bytes_of(self.path)

    @property
    def scheme(self) -> str:
        """For example `W4A4`."""
        if self.engine:
            return self.engine.scheme
        assert self.artifact is not None  # an artifact or an engine is always set
        return self.artifact.scheme


@dataclass(frozen=True, kw_only=True)
class Result:
    """Evaluation of one target.

    Attributes:
        target: The artifact or engine.
        error: Error with respect to the float model.
        statistics: By site and step; empty for an engine.
        agreement: By site, with the reference; None if it was not measured.
        notes: Reasons why something was not measured.
        metrics: Metrics of the final images by label; empty if none was requested.
    """

    target: EvaluationTarget
    error: TrajectoryError
    statistics: tuple[SiteStatistics, ...] = ()
    agreement: tuple[SiteAgreement, ...] | None = None
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A complete evaluation.

    Attributes:
        reference: The float model.
        trajectory: Its sampling trajectories.
        results: One for each target, in the given order.
        date: Local time.
        machine, versions: Hardware and package versions of the measurement.
        waiting: Engines that were built for another machine and have not run.
        bench: Rows of a benchmark; empty if none was run.
        notes: Further remarks.
    """

    reference: Source
    trajectory: ReferenceTrajectory
    results: tuple[Result, ...]
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    waiting: tuple[EvaluationTarget, ...] = ()
    bench: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All figures by name; a figure that is not finite is None, as JSON has no number for it."""
        setup = dataclasses.asdict(self.trajectory.settings) | {
            "guidance": self.trajectory.guidance,
            "conditioning": self.trajectory.conditioner.origin,
            "scheduler": self.trajectory.scheduler,
            "eta": 0.0,
            "timesteps": self.trajectory.timesteps,
            "step_weights": self.trajectory.step_weights.tolist(),
            "loras": [{"file": str(file), "weight": weight} for file, weight in self.trajectory.settings.loras],
            "compared": self.trajectory.decoder.kind,
        }
        parameters = sum(value.numel() for value in self.reference.model.parameters())
        float_model = {
            "name": self.reference.name,
            "parameters": parameters,
            "fp32_bytes": 4 * parameters,
            "seconds_per_batch": self.trajectory.seconds,
        }
        content: dict[str, Any] = {
            "date": self.date,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "setup": setup,
            "reference": float_model,
            "results": [result_json(result) for result in self.results],
            "waiting": [engine_json(target) for target in self.waiting],
            "bench": [dict(row) for row in self.bench],
            "notes": list(self.notes),
        }
        strict: dict[str, Any] = finite(content)
        return strict


def headline(report: Report) -> list[Row]:
    """One row of main figures for each target."""
    return [
        {
            "name": result.target.label,
            "kind": result.target.kind,
            "scheme": result.target.scheme,
            "PSNR dB": psnr_words(result.error),
            "weighted error": result.error.weighted_error,
            "noise error": result.error.noise_error,
            "MB": round(result.target.bytes / 1e6, 2),
            "codes beyond a tie": sum(site.differ for site in result.agreement) if result.agreement is not None else None,
        }
        | {label: round(value, 4) for label, value in result.metrics.items()}
        for result in report.results
    ]


def psnr_words(error: TrajectoryError) -> str:
    """The mean PSNR in dB; with the lowest and highest of the seeds where there are several: `26.4 (25.1 to 27.3)`."""
    words = f"{error.psnr:.2f}"
    return words if len(error.psnrs) == 1 else f"{words} ({min(error.psnrs):.2f} to {max(error.psnrs):.2f})"


def result_json(result: Result) -> dict[str, Any]:
    """All figures of one target."""
    target, error = result.target, result.error
    content: dict[str, Any] = {
        "label": target.label,
        "kind": target.kind,
        "path": str(target.path),
        "scheme": target.scheme,
        "bytes": target.bytes,
        "noise_error": error.noise_error,
        "noise_error_by_step": list(error.noise_errors),
        "weighted_error": error.weighted_error,
        "weighted_error_by_step": list(error.weighted_errors),
        "psnr_db": error.psnr,
        "psnr_db_by_seed": list(error.psnrs),
        "seconds_per_batch": error.seconds,
        "metrics": dict(result.metrics),
        "notes": list(result.notes),
    }
    if target.artifact:
        content["provenance"] = dict(target.artifact.provenance)
    if target.engine:
        content |= engine_json(target)
    elif target.artifact:
        content["plan"] = {name: summary(plan_layers(target.artifact, backend)) for name, backend in CAPABILITIES.items()}
    if result.statistics:
        content["sites"] = [dataclasses.asdict(site) for site in result.statistics]
    if result.agreement is not None:
        content["agreement"] = agreement_json(result.agreement)
    return content


def engine_json(target: EvaluationTarget) -> dict[str, Any]:
    """Backend, build and plan of an engine, from its manifest."""
    assert target.engine is not None  # the caller chose an engine
    engine = target.engine
    return {"label": target.label, "backend": engine.backend, "build": dict(engine.build), "plan": summary(engine.plan)}


def agreement_json(sites: Sequence[SiteAgreement]) -> dict[str, Any]:
    """Totals over the sites, and each site."""
    codes = sum(site.codes for site in sites)
    differ = sum(site.differ for site in sites)
    return {
        "codes": codes,
        "ties": sum(site.ties for site in sites),
        "beyond_a_tie": differ,
        "flip_rate": (differ + sum(site.ties for site in sites)) / max(codes, 1),
        "mean_output_error": fmean(site.output_error for site in sites),
        "sites": [dataclasses.asdict(site) for site in sites],
    }


def final_samples(report: Report) -> list[tuple[str, Tensor]]:
    """Final images by label, [B, C, H, W] in about [-1, 1], the float model's first."""
    trajectory = report.trajectory
    images = [("float", trajectory.images), *((result.target.label, result.error.images) for result in report.results)]
    return [(label, trajectory.decoder.visible(found, trajectory.images)) for label, found in images]


def describe_settings(report: Report) -> str:
    """How samples were drawn and what was compared, as sentences without markup."""
    trajectory, settings = report.trajectory, report.trajectory.settings
    scheduler = "DDIM (eta 0)" if trajectory.scheduler == "ddim" else "Euler (flow matching)"
    conditioning = f", conditioning {trajectory.conditioner.origin}" if trajectory.conditioning.conditional else ""
    guidance = "" if trajectory.guidance is None else f", guidance {trajectory.guidance:g}"
    loras = "".join(f", LoRA {file.name}:{weight:g}" for file, weight in settings.loras)
    return (
        f"{settings.samples} samples{' of each seed' if len(settings.seeds) > 1 else ''}, {settings.steps} steps of {scheduler}, "
        f"seed{'s' if len(settings.seeds) > 1 else ''} {', '.join(map(str, settings.seeds))}{conditioning}{guidance}{loras}. "
        f"PSNR of {trajectory.decoder.words}."
    )

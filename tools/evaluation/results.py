"""What an evaluation found: figures for people, for report.json and for report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.capabilities import CAPABILITIES, plan_layers, summary
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.common.console import Row, bytes_of
from edm_deploy_tools.evaluation.site_agreement import SiteAgreement, SiteStatistics
from edm_deploy_tools.evaluation.trajectory_error import ReferenceTrajectory, TrajectoryError


@dataclass(frozen=True, kw_only=True)
class EvaluationTarget:
    """What is judged.

    Attributes:
        label: Its name in the report.
        path: An artifact or engine directory.
        artifact: It, or what the engine was built from where that is known.
        engine: The manifest, for an engine.
    """

    label: str
    path: Path
    artifact: Artifact | None
    engine: Manifest | None

    @property
    def kind(self) -> Literal["artifact", "engine"]:
        """Which of the two."""
        return "engine" if self.engine else "artifact"

    @property
    def bytes(self) -> int:
        """On disk: of the artifact's directory, or of the engine without text encoders and VAE, which may lie beside it."""
        return int(self.engine.build.get("engine_bytes") or bytes_of(self.path)) if self.engine else bytes_of(self.path)

    @property
    def scheme(self) -> str:
        """`W4A4`."""
        if self.engine:
            return self.engine.scheme
        assert self.artifact is not None  # one of the two is there
        return self.artifact.scheme


@dataclass(frozen=True, kw_only=True)
class Result:
    """One subject, judged.

    Attributes:
        subject: It.
        distance: To the float model.
        statistics: By site and step; empty for an engine.
        agreement: By site with the reference; None where it was not or could not be measured.
        notes: Why something was not measured.
    """

    subject: EvaluationTarget
    distance: TrajectoryError
    statistics: tuple[SiteStatistics, ...] = ()
    agreement: tuple[SiteAgreement, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was measured.

    Attributes:
        reference: The float model.
        walk: Its walk.
        results: One for each subject, in the order given.
        date: Local time.
        machine, versions: Where and with what it was measured.
        waiting: Engines that were built here and run elsewhere.
        bench: Rows of a benchmark, where one was run beside.
        notes: What else a reader must know.
    """

    reference: Source
    walk: ReferenceTrajectory
    results: tuple[Result, ...]
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    waiting: tuple[EvaluationTarget, ...] = ()
    bench: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Every figure, by name."""
        setup = dataclasses.asdict(self.walk.setup) | {
            "guidance": self.walk.guidance,
            "conditioning": self.walk.origin,
            "scheduler": self.walk.scheduler,
            "eta": 0.0,
            "timesteps": self.walk.timesteps,
            "compared": self.walk.decoder.kind,
        }
        parameters = sum(value.numel() for value in self.reference.model.parameters())
        float_model = {
            "name": self.reference.name,
            "parameters": parameters,
            "fp32_bytes": 4 * parameters,
            "seconds_per_batch": self.walk.seconds,
        }
        return {
            "date": self.date,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "setup": setup,
            "reference": float_model,
            "results": [result_json(result) for result in self.results],
            "waiting": [engine_json(subject) for subject in self.waiting],
            "bench": [dict(row) for row in self.bench],
            "notes": list(self.notes),
        }


def headline(report: Report) -> list[Row]:
    """One line for each subject: what people ask first."""
    return [
        {
            "name": result.subject.label,
            "kind": result.subject.kind,
            "scheme": result.subject.scheme,
            "noise error": result.distance.noise_error,
            "PSNR dB": round(result.distance.psnr, 2),
            "MB": round(result.subject.bytes / 1e6, 2),
            "codes beyond a tie": sum(site.differ for site in result.agreement) if result.agreement is not None else None,
        }
        for result in report.results
    ]


def result_json(result: Result) -> dict[str, Any]:
    """One subject's figures."""
    subject, far = result.subject, result.distance
    content: dict[str, Any] = {
        "label": subject.label,
        "kind": subject.kind,
        "path": str(subject.path),
        "scheme": subject.scheme,
        "bytes": subject.bytes,
        "noise_error": far.noise_error,
        "noise_error_by_step": list(far.noise_errors),
        "psnr_db": far.psnr,
        "seconds_per_batch": far.seconds,
        "notes": list(result.notes),
    }
    if subject.artifact:
        content["provenance"] = dict(subject.artifact.provenance)
    if subject.engine:
        content |= engine_json(subject)
    elif subject.artifact:
        content["plan"] = {name: summary(plan_layers(subject.artifact, target)) for name, target in CAPABILITIES.items()}
    if result.statistics:
        content["sites"] = [dataclasses.asdict(site) for site in result.statistics]
    if result.agreement is not None:
        content["agreement"] = agreement_json(result.agreement)
    return content


def engine_json(subject: EvaluationTarget) -> dict[str, Any]:
    """What is known of an engine without running it."""
    assert subject.engine is not None  # the caller chose an engine
    engine = subject.engine
    return {"label": subject.label, "backend": engine.backend, "build": dict(engine.build), "plan": summary(engine.plan)}


def agreement_json(sites: Sequence[SiteAgreement]) -> dict[str, Any]:
    """Totals, then each site."""
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
    walked = report.walk
    images = [("float", walked.images), *((result.subject.label, result.distance.images) for result in report.results)]
    return [(label, walked.decoder.visible(found, walked.images)) for label, found in images]


def conditions(report: Report) -> str:
    """How samples were drawn and what was compared, as sentences without markup."""
    walked, setup = report.walk, report.walk.setup
    process = "DDIM without fresh noise" if walked.scheduler == "ddim" else "Euler along the flow"
    told = "" if not walked.conditioning.conditional else f", conditioning {walked.origin}"
    guided = "" if walked.guidance is None else f", guidance {walked.guidance:g}"
    return f"{setup.samples} samples, {setup.steps} steps of {process}, seed {setup.seed}{told}{guided}. PSNR of {walked.decoder.words}."

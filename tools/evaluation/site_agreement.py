"""One layer at a time: how well its table fits what it sees, and whether an engine computes what the reference computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import engines
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.reference import Reference, SiteRecord
from edm_deploy.numerics.activation_table import per_sample, table_rows
from edm_deploy.runtime.backend import SiteTestCase
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.evaluation.trajectory_error import ReferenceTrajectory

SAMPLES = 4  # of the walk's batch: enough for shares and ratios, and the records of all sites fit in memory
TIE = 2.0**-12  # |frac(x / s) - 1/2| below this is a tie: float32 keeps x / s of 8 bits to 2^-17
HIGHEST_SQNR = 150.0  # dB; what float32 can show


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """How a site's table fits what the site sees, at each step of the walk.

    Attributes:
        site: Its name.
        scheme: `W4A4`.
        rows: Table row of each step.
        range_use: Codes between the smallest and largest used, as a share of the codes there are.
        clipped: Share of inputs outside the range.
        sqnr: Signal to quantization noise of the input, in dB.
        scale: The table's scale.
    """

    site: str
    scheme: str
    rows: tuple[int, ...]
    range_use: tuple[float, ...]
    clipped: tuple[float, ...]
    sqnr: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SiteAgreement:
    """One site of an engine against the reference, from the reference's own input.

    Attributes:
        site: Its name.
        codes: Number of input codes compared.
        ties: Codes that are 1 apart at a rounding tie.
        differ: Codes that differ by more than a tie explains.
        output_error: Largest |y_engine - y_reference| over the largest |y_reference|.
    """

    site: str
    codes: int
    ties: int
    differ: int
    output_error: float


def statistics(artifact: Artifact, walk: ReferenceTrajectory) -> list[SiteStatistics]:
    """Range use, clipping and SQNR of each quantized input along the float model's walk."""
    reference = Reference(artifact)
    columns: dict[str, list[tuple[int, float, float, float, float]]] = {}
    for step in walk.steps:
        inputs = _inputs_at(walk, [step.timestep] * SAMPLES, step.sample[:SAMPLES])
        row = int(table_rows(artifact.row_of_timestep, torch.tensor([step.timestep])))
        for name, record in reference.record(inputs).items():
            if artifact.sites[name].activation is not None:
                columns.setdefault(name, []).append((row, *_fit(record, artifact.sites[name], row)))
    result = []
    for name, entries in columns.items():
        rows, range_use, clipped, sqnr, scale = zip(*entries, strict=True)
        result.append(
            SiteStatistics(
                site=name, scheme=artifact.sites[name].scheme, rows=rows, range_use=range_use, clipped=clipped, sqnr=sqnr, scale=scale
            )
        )
    return result


def _fit(record: SiteRecord, site: QuantizedLayer, row: int) -> tuple[float, float, float, float]:
    """Range use, clipped share, SQNR in dB and scale of one site at one row."""
    table = site.activation
    assert table is not None  # the caller leaves weight-only sites out
    qmin, qmax, scale = int(table.qmin[row]), int(table.qmax[row]), float(table.scale[row])
    codes = (record.x * table.inv_scale[row]).round()
    used = (float(record.codes.max()) - float(record.codes.min()) + 1) / (qmax - qmin + 1)
    clipped = float(((codes < qmin) | (codes > qmax)).double().mean())
    noise = float((record.x.double() - record.codes.double() * scale).pow(2).sum())
    signal = float(record.x.double().pow(2).sum())
    sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else HIGHEST_SQNR
    return used, clipped, min(sqnr, HIGHEST_SQNR), scale


def cut_at_sites(artifact: Artifact, walk: ReferenceTrajectory, scratch: Path, *, dtype: torch.dtype) -> SiteTestCase:
    """What the reference makes of every site alone, each from what it saw on points of the walk.

    Args:
        artifact: Whose sites.
        walk: Of the float model.
        scratch: A directory for what backends make of the cut.
        dtype: What the judged engine rounds a site's input to; the reference starts from the same rounded values.
    """
    chosen = [walk.steps[round(index * (len(walk.steps) - 1) / (SAMPLES - 1))] for index in range(SAMPLES)]
    samples = torch.stack([step.sample[index % len(step.sample)] for index, step in enumerate(chosen)])
    inputs = _inputs_at(walk, [step.timestep for step in chosen], samples)
    return cut_from_inputs(artifact, inputs, scratch, dtype=dtype)


def cut_from_inputs(artifact: Artifact, inputs: Mapping[str, Tensor], scratch: Path, *, dtype: torch.dtype) -> SiteTestCase:
    """As `cut_at_sites`, from graph inputs by name; samples of the batch may stand at different timesteps."""
    reference = Reference(artifact)
    records = reference.record(inputs)
    if dtype != torch.float32:
        records = reference.at_sites({name: record.x.to(dtype).float() for name, record in records.items()}, inputs["timestep"])
    scratch.mkdir(parents=True, exist_ok=True)
    return SiteTestCase(artifact=artifact, timestep=inputs["timestep"], records=records, scratch=scratch)


def agreement(cut: SiteTestCase, engine: Manifest, *, device: str | None = None) -> list[SiteAgreement]:
    """Every site of an engine against the reference, each from the reference's own input: the one judge of all backends.

    Args:
        cut: Of the artifact that the engine was built from.
        engine: Its manifest; the same backend computes each site alone, with the same options.
        device: Where it runs; None is where its backend runs.

    Raises:
        UnsupportedError: The backend cannot run on this machine.
    """
    backend = engines.backend_named(str(engine.backend))
    found = backend.at_sites(cut, engine, torch.device(device or backend.device))
    rows = table_rows(cut.artifact.row_of_timestep, cut.timestep)
    return [compare(name, cut.artifact.sites[name], record, found, rows) for name, record in cut.records.items()]


def compare(name: str, site: QuantizedLayer, record: SiteRecord, found: Mapping[str, Tensor], rows: Tensor) -> SiteAgreement:
    """One site's codes and output against its record.

    Args:
        name: The site's.
        site: It.
        record: What the reference saw.
        found: What the engine computes, `<site>.codes` and `<site>.y`.
        rows: int64 [B], table row of each sample.
    """
    codes = ties = differ = 0
    if site.activation is not None:
        apart = (found[f"{name}.codes"].cpu().float() - record.codes).abs()
        scaled = record.x * per_sample(site.activation.inv_scale, rows, record.x)
        tie = (apart == 1) & ((scaled - scaled.floor() - 0.5).abs() < TIE)
        codes, ties, differ = apart.numel(), int(tie.sum()), int((apart > 0).sum() - tie.sum())
    largest = max(float(record.y.abs().max()), torch.finfo(torch.float32).tiny)
    error = float((found[f"{name}.y"].cpu().float() - record.y).abs().max()) / largest
    return SiteAgreement(site=name, codes=codes, ties=ties, differ=differ, output_error=error)


def _inputs_at(walk: ReferenceTrajectory, timesteps: list[float], samples: Tensor) -> dict[str, Tensor]:
    """Graph inputs of some samples, both halves of a guided model: a site sees the one as often as the other."""
    members = torch.arange(len(samples)) % len(walk.noise)
    return walk.conditioning.of_members(members).inputs(samples, torch.tensor(timesteps[: len(samples)]))

"""Per layer: how well its activation table fits its inputs, and whether an engine computes the same as the reference."""

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
from edm_deploy.network.adapter_inputs import SLOT_SCALES, AdapterInputs
from edm_deploy.numerics.activation_table import per_sample, table_rows
from edm_deploy.runtime.backend import SiteTestCase
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.evaluation.trajectory_error import ReferenceTrajectory

SAMPLES = 4  # of the trajectory's batch: enough for shares and ratios, and the records of all sites fit in memory
TIE = 2.0**-12  # |frac(x / s) - 1/2| below this is a tie: float32 keeps x / s of 8 bits to 2^-17
HIGHEST_SQNR = 150.0  # dB; the resolution of float32


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """Fit of a site's activation table to its inputs, at each step of the trajectory.

    Attributes:
        site: Name of the site.
        scheme: For example `W4A4`.
        rows: Table row of each step.
        range_use: Number of codes from the smallest to the largest used, as a share of all codes, 0 to 1.
        clipped: Share of the inputs outside the range, 0 to 1.
        sqnr: Signal-to-quantization-noise ratio of the input, in dB.
        scale: Scale of the table row.
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
    """Comparison of one site of an engine with the reference, both computed from the reference's input.

    Attributes:
        site: Name of the site.
        codes: Number of input codes compared.
        ties: Number of codes that differ by 1 at a rounding tie.
        differ: Number of codes that differ otherwise.
        output_error: max |y_engine - y_reference| / max |y_reference|.
    """

    site: str
    codes: int
    ties: int
    differ: int
    output_error: float


def site_statistics(artifact: Artifact, trajectory: ReferenceTrajectory) -> list[SiteStatistics]:
    """Range use, clipping and SQNR of each quantized input along the float model's trajectory."""
    reference = Reference(artifact)
    columns: dict[str, list[tuple[int, float, float, float, float]]] = {}
    for step in trajectory.steps:
        inputs = _inputs_at(trajectory, [step.timestep] * SAMPLES, step.sample[:SAMPLES])
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
    assert table is not None  # the caller excludes weight-only sites
    qmin, qmax, scale = int(table.qmin[row]), int(table.qmax[row]), float(table.scale[row])
    codes = (record.x * table.inv_scale[row]).round()
    used = (float(record.codes.max()) - float(record.codes.min()) + 1) / (qmax - qmin + 1)
    clipped = float(((codes < qmin) | (codes > qmax)).double().mean())
    noise = float((record.x.double() - record.codes.double() * scale).pow(2).sum())
    signal = float(record.x.double().pow(2).sum())
    sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else HIGHEST_SQNR
    return used, clipped, min(sqnr, HIGHEST_SQNR), scale


def cut_from_trajectory(artifact: Artifact, trajectory: ReferenceTrajectory, scratch: Path, *, dtype: torch.dtype) -> SiteTestCase:
    """Inputs and outputs of every site in the reference executor, at points spread over the float model's trajectory.

    Args:
        artifact: The artifact whose sites are recorded.
        trajectory: Of the float model.
        scratch: A directory for the files that backends derive from the test case.
        dtype: Type to which the compared engine rounds a site's input; the reference starts from the same rounded values.
    """
    steps = trajectory.steps
    chosen = [steps[round(index * (len(steps) - 1) / (SAMPLES - 1))] for index in range(SAMPLES)]
    samples = torch.stack([step.sample[index % len(step.sample)] for index, step in enumerate(chosen)])
    inputs = _inputs_at(trajectory, [step.timestep for step in chosen], samples)
    return cut_from_inputs(artifact, inputs, scratch, dtype=dtype)


def cut_from_inputs(
    artifact: Artifact,
    inputs: Mapping[str, Tensor],
    scratch: Path,
    *,
    dtype: torch.dtype,
    adapters: AdapterInputs | None = None,
    adapter_values: Mapping[str, Tensor] | None = None,
) -> SiteTestCase:
    """As `cut_from_trajectory`, from graph inputs by name; samples of the batch may have different timesteps.

    With `adapters`, every site that has a branch is compared with its sum; `adapter_values` are float32, by input of the branches.
    """
    values = dict(adapter_values or {})
    reference = Reference(artifact, values)
    records = reference.record({**inputs, **{name: value for name, value in values.items() if name == SLOT_SCALES}})
    if dtype != torch.float32:
        records = reference.at_sites({name: record.x.to(dtype).float() for name, record in records.items()}, inputs["timestep"])
    scratch.mkdir(parents=True, exist_ok=True)
    return SiteTestCase(
        artifact=artifact, timestep=inputs["timestep"], records=records, scratch=scratch, adapters=adapters, adapter_values=values
    )


def agreement(cut: SiteTestCase, engine: Manifest, *, device: str | None = None) -> list[SiteAgreement]:
    """Compare every site of an engine with the reference, each from the reference's input; all backends are compared this way.

    Args:
        cut: Of the artifact that the engine was built from.
        engine: Manifest of the engine; the same backend computes each site separately, with the same options.
        device: Where the sites run; None is the default device of the engine.

    Raises:
        UnsupportedError: The backend cannot run on this machine.
    """
    backend = engines.backend_named(str(engine.backend))
    outputs = backend.at_sites(cut, engine, torch.device(device or backend.default_device(engine)))
    rows = table_rows(cut.artifact.row_of_timestep, cut.timestep)
    return [compare_site(name, cut.artifact.sites[name], record, outputs, rows) for name, record in cut.records.items()]


def compare_site(name: str, site: QuantizedLayer, record: SiteRecord, outputs: Mapping[str, Tensor], rows: Tensor) -> SiteAgreement:
    """Compare the codes and the output of one site with the reference's record.

    Args:
        name: Name of the site.
        site: The quantized layer.
        record: Input, codes and output in the reference.
        outputs: Results of the engine, `<site>.codes` and `<site>.y`.
        rows: int64 [B], table row of each sample.
    """
    codes = ties = differ = 0
    if site.activation is not None:
        apart = (outputs[f"{name}.codes"].cpu().float() - record.codes).abs()
        scaled = record.x * per_sample(site.activation.inv_scale, rows, record.x)
        tie = (apart == 1) & ((scaled - scaled.floor() - 0.5).abs() < TIE)
        codes, ties, differ = apart.numel(), int(tie.sum()), int((apart > 0).sum() - tie.sum())
    largest = max(float(record.y.abs().max()), torch.finfo(torch.float32).tiny)
    error = float((outputs[f"{name}.y"].cpu().float() - record.y).abs().max()) / largest
    return SiteAgreement(site=name, codes=codes, ties=ties, differ=differ, output_error=error)


def _inputs_at(trajectory: ReferenceTrajectory, timesteps: list[float], samples: Tensor) -> dict[str, Tensor]:
    """Graph inputs of some samples; of a guided model both the conditional and the unconditional half, as in sampling."""
    members = torch.arange(len(samples)) % len(trajectory.noise)
    return trajectory.conditioning.of_members(members).inputs(samples, torch.tensor(timesteps[: len(samples)]))

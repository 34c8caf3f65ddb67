"""report.html: an evaluation as one self-contained page without scripts or external files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from edm_deploy.pipelines.custom import images_from_sample
from edm_deploy.runtime.capabilities import summary
from edm_deploy_tools.common.console import Row, cell, size_words, time_words
from edm_deploy_tools.evaluation.charts import curves, heat_map, png_uri
from edm_deploy_tools.evaluation.results import (
    EvaluationTarget,
    Report,
    Result,
    agreement_json,
    describe_settings,
    final_samples,
    psnr_words,
)
from edm_deploy_tools.evaluation.site_agreement import SiteAgreement
from edm_deploy_tools.images.sample import grid_of

STYLE = Path(__file__).parent / "report.css"
COLUMNS = 4  # of an image grid


def report_html(report: Report) -> str:
    """The page as HTML text."""
    sections = [_head(report), _summary(report), _images(report), _curve(report), _engines(report), _bench(report)]
    sections += [_tables(result) + bits_section(result.target) for result in report.results if result.statistics]
    sections += [_sites(report), _conditions(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>edm-deploy: {escape(Path(report.reference.name).name)}</title><style>{STYLE.read_text()}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(report: Report) -> str:
    machine = report.machine
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB" + (f", {machine['gpu']}" if "gpu" in machine else "")
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in report.notes)
    return (
        f'<h1>{escape(Path(report.reference.name).name)}, quantized</h1><p class="soft">{escape(report.date)} on {escape(where)}</p>{notes}'
    )


def _summary(report: Report) -> str:
    parameters = sum(value.numel() for value in report.reference.model.parameters())
    metrics = list(dict.fromkeys(label for result in report.results for label in result.metrics))
    rows: list[Row] = [
        {
            "": "float",
            "scheme": "fp32",
            "PSNR, dB": None,
            "weighted error": None,
            "mean noise error": None,
            **dict.fromkeys(metrics),
            "on disk": size_words(4 * parameters),
            "one call": f"{1000 * report.trajectory.seconds:.0f} ms",
            "executed by": "torch, float32",
        }
    ]
    for result in report.results:
        engine = result.target.engine
        rows.append(
            {
                "": result.target.label,
                "scheme": result.target.scheme,
                "PSNR, dB": psnr_words(result.error),
                "weighted error": f"{result.error.weighted_error:.3g}",
                "mean noise error": f"{result.error.noise_error:.4f}",
                **{label: f"{result.metrics[label]:.4g}" for label in metrics},
                "on disk": size_words(result.target.bytes),
                "one call": f"{1000 * result.error.seconds:.0f} ms" if engine else None,
                "executed by": str(engine.backend) if engine else "reference executor, exact integers",
            }
        )
    return (
        "<h2>Error against the float model</h2>"
        f'<p class="soft">{escape(describe_settings(report))} '
        "PSNR: final images from the same initial noise, each model on its own trajectory. "
        "Noise error: ||e<sub>q</sub> - e||<sup>2</sup> / ||e||<sup>2</sup> of the predicted noise along the float model's trajectory, mean over the steps. "
        "Weighted error: each step's squared error times its measured effect on the final sample, summed over the steps. One call: median wall time of one forward pass, "
        f"batch {len(report.trajectory.noise)}; with classifier-free guidance it includes the conditional and the unconditional half.</p>"
        + html_table(rows, numbers=("PSNR, dB", "weighted error", "mean noise error", *metrics, "on disk", "one call"))
    )


def _images(report: Report) -> str:
    figures = []
    by_label = {result.target.label: result for result in report.results}
    for label, samples in final_samples(report):
        result = by_label.get(label)
        words = f"{result.target.scheme}, {result.error.psnr:.1f} dB" if result else "the float model"
        figures.append(
            f'<figure><img alt="samples, {escape(label)}" src="{grid_uri(samples)}"><figcaption><b>{escape(label)}</b>{words}</figcaption></figure>'
        )
    return f'<h2>Images from the same initial noise</h2><div class="images">{"".join(figures)}</div>'


def grid_uri(samples: torch.Tensor) -> str:
    """A grid of samples, float [n, C, H, W] in [-1, 1], as a data URI."""
    pixels = (images_from_sample(samples) * 255).round().astype(np.uint8)
    images = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image[..., :3]) for image in pixels]
    return png_uri(grid_of(images, columns=min(COLUMNS, len(images))))


def _curve(report: Report) -> str:
    series = {result.target.label: result.error.noise_errors for result in report.results}
    timesteps, x_label = report.trajectory.timesteps, "timestep, from noise to image"
    weighted = {result.target.label: result.error.weighted_errors for result in report.results}
    return (
        "<h2>Error by step</h2>"
        + curves(weighted, timesteps, x_label=x_label, y_label="expected change of the final sample")
        + curves(series, timesteps, x_label=x_label, y_label="relative error of the predicted noise")
    )


def _engines(report: Report) -> str:
    evaluated = [(result.target, result.agreement) for result in report.results if result.target.engine]
    rows = [_engine_row(target, agreement) for target, agreement in [*evaluated, *((target, None) for target in report.waiting)]]
    if not rows:
        return ""
    notes = [f"{result.target.label}: {note}" for result in report.results for note in result.notes]
    notes += [f"{target.label} was built ahead of time for {_gpu(target)} and has not run on this machine." for target in report.waiting]
    return (
        "<h2>Engines</h2>"
        '<p class="soft">Agreement: each quantized layer is computed from the reference executor\'s input and compared code by code. At a rounding tie two '
        "correct executors may differ by one code; every other difference is counted as beyond a tie.</p>"
        + html_table(rows, numbers=("build", "codes compared", "ties", "beyond a tie", "largest output error"))
        + "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    )


def _engine_row(target: EvaluationTarget, agreement: Sequence[SiteAgreement] | None) -> Row:
    engine = target.engine
    assert engine is not None  # the caller chose the engines
    options = ", ".join(f"{name} {value}" for name, value in engine.build.get("options", {}).items() if value is not None)
    totals = agreement_json(agreement) if agreement is not None else None
    return {
        "": target.label,
        "plan": summary(engine.plan) + (f" ({options})" if options else ""),
        "build": time_words(float(engine.build.get("seconds", 0))),
        "codes compared": f"{totals['codes']:,}" if totals else None,
        "ties": f"{totals['ties']:,}" if totals else None,
        "beyond a tie": f"{totals['beyond_a_tie']:,} ({100 * totals['beyond_a_tie'] / max(totals['codes'], 1):.2g} %)" if totals else None,
        "largest output error": f"{max((site.output_error for site in agreement), default=0):.1e}" if agreement else None,
    }


def _gpu(target: EvaluationTarget) -> str:
    assert target.engine is not None  # only engines are built ahead of time
    return str(target.engine.build.get("options", {}).get("gpu") or target.engine.backend)


def _bench(report: Report) -> str:
    if not report.bench:
        return ""
    numbers = [name for name, value in report.bench[0].items() if isinstance(value, int | float)]
    return "<h2>Speed</h2>" + html_table(report.bench, numbers=numbers)


def _tables(result: Result) -> str:
    artifact = result.target.artifact
    assert artifact is not None  # statistics come from an artifact
    tables = {name: site.activation for name, site in artifact.sites.items() if site.activation}
    values = np.stack([table.scale.double().numpy() for table in tables.values()])
    timesteps = [float(timestep) for timestep in artifact.timesteps]
    chart = heat_map(values, list(tables), timesteps, x_label="timestep of the table row", value_label="input scale (log)")
    return (
        f"<h2>Activation scales: {escape(result.target.label)}</h2>"
        f'<p class="soft">Scale of the input of each of {len(tables)} layers at each of {len(timesteps)} calibrated timesteps. The colour of a row changes where the range of the layer input changes along the trajectory.</p>{chart}'
    )


def bits_section(target: EvaluationTarget) -> str:
    """Bits of each layer's input at each table row, of an artifact where they differ by layer or by timestep; empty otherwise."""
    artifact = target.artifact
    assert artifact is not None  # statistics come from an artifact
    sites = {name: site.activation.bits for name, site in artifact.sites.items() if site.activation}
    relaxed = (
        np.zeros(len(artifact.timesteps), bool) if artifact.relaxed is None else artifact.relaxed[artifact.timesteps.long()].numpy() > 0
    )
    bits = np.array(list(sites.values()), float)[:, None].repeat(len(relaxed), axis=1)
    bits[:, relaxed] = np.maximum(bits[:, relaxed], artifact.relaxed_bits or 0)
    placed = artifact.family_object.placement
    if len({*bits[[placed(name) == "quantize" for name in sites]].flatten().tolist()}) < 2:
        return ""
    timesteps = [float(timestep) for timestep in artifact.timesteps]
    chart = heat_map(bits, list(sites), timesteps, x_label="timestep of the table row", value_label="bits of the input (log)")
    return f"<h2>Bits of the inputs: {escape(target.label)}</h2>{chart}"


def _sites(report: Report) -> str:
    parts = []
    for result in report.results:
        if not result.statistics:
            continue
        rows: list[Row] = [
            {
                "layer": site.site,
                "scheme": site.scheme,
                "range used, %": f"{100 * fmean(site.range_use):.0f}",
                "clipped, %": f"{100 * fmean(site.clipped):.2f}",
                "most clipped, %": f"{100 * max(site.clipped):.2f}",
                "SQNR, dB": f"{fmean(site.sqnr):.1f}",
                "lowest SQNR, dB": f"{min(site.sqnr):.1f}",
            }
            for site in sorted(result.statistics, key=lambda site: fmean(site.sqnr))
        ]
        table = html_table(rows, numbers=list(rows[0])[2:], dense=True)
        parts.append(f"<details><summary>{escape(result.target.label)}: {len(rows)} layers, lowest SQNR first</summary>{table}</details>")
    if not parts:
        return ""
    return (
        "<h2>Layers</h2>"
        '<p class="soft">The quantized input of each layer along the float model\'s trajectory: share of the codes in use, share of values outside the range, '
        f"and signal-to-quantization-noise ratio (SQNR); mean over the steps, and the worst step.</p>{''.join(parts)}"
    )


def _conditions(report: Report) -> str:
    parts = [definitions({**report.machine, **report.versions})]
    for result in report.results:
        facts = {"path": str(result.target.path)}
        if result.target.artifact and not result.target.engine:
            facts |= {name: _words(name, value) for name, value in result.target.artifact.provenance.items()}
        if result.target.engine:
            facts |= {f"build {name}": _words(name, value) for name, value in result.target.engine.build.items()}
        parts.append(f"<details><summary>{escape(result.target.label)}: how it was made</summary>{definitions(facts)}</details>")
    return f"<h2>Machine, versions, provenance</h2>{''.join(parts)}"


def _words(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, int | float) and not isinstance(value, bool) and "seconds" in name:
        return time_words(float(value))
    if isinstance(value, int) and ("bytes" in name or "memory" in name):
        return size_words(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def definitions(facts: Mapping[str, Any]) -> str:
    """Names and values as a definition list."""
    return "<dl>" + "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()) + "</dl>"


def html_table(rows: Sequence[Row], *, numbers: Sequence[str] = (), dense: bool = False) -> str:
    """An HTML table whose columns are the keys of the first row.

    Args:
        rows: Values by column.
        numbers: Columns that are aligned right.
        dense: Whether to use small type, for many rows.
    """

    def kind(index: int, name: str) -> str:
        return ' class="number"' if name in numbers else ' class="name"' if index == 0 and not dense else ""

    head = "".join(f"<th{kind(1, name)}>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td{kind(index, name)}>{escape(cell(row[name]))}</td>" for index, name in enumerate(rows[0])) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table{" class=" + chr(34) + "dense" + chr(34) if dense else ""}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

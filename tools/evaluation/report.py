"""report.html: one file that says it all, without a network, without a script."""

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
from edm_deploy_tools.evaluation.results import EvaluationTarget, Report, Result, agreement_json, conditions, final_samples
from edm_deploy_tools.evaluation.site_agreement import SiteAgreement
from edm_deploy_tools.images.sample import grid_of

STYLE = Path(__file__).parents[1] / "report.css"
COLUMNS = 4  # of the image grids


def html_of(report: Report) -> str:
    """The page."""
    sections = [_head(report), _summary(report), _images(report), _curve(report), _engines(report), _bench(report)]
    sections += [_tables(result) for result in report.results if result.statistics]
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
    rows: list[Row] = [
        {
            "": "float",
            "scheme": "fp32",
            "mean noise error": None,
            "PSNR, dB": None,
            "on disk": size_words(4 * parameters),
            "one call": f"{1000 * report.walk.seconds:.0f} ms",
            "computed by": "torch, float32",
        }
    ]
    for result in report.results:
        engine = result.subject.engine
        rows.append(
            {
                "": result.subject.label,
                "scheme": result.subject.scheme,
                "mean noise error": f"{result.distance.noise_error:.4f}",
                "PSNR, dB": f"{result.distance.psnr:.1f}",
                "on disk": size_words(result.subject.bytes),
                "one call": f"{1000 * result.distance.seconds:.0f} ms" if engine else None,
                "computed by": str(engine.backend) if engine else "reference executor, exact integers",
            }
        )
    return (
        "<h2>How far from the float model</h2>"
        f'<p class="soft">{escape(conditions(report))} '
        "Noise error: squared distance of the prediction to the float model's, relative to its square, along the float model's own trajectory, mean over the steps. "
        "PSNR: final images from the same noise, each model on its own trajectory. One call: median over the trajectories, "
        f"batch {len(report.walk.noise)}, both halves of a guided model.</p>"
        + html_table(rows, numbers=("mean noise error", "PSNR, dB", "on disk", "one call"))
    )


def _images(report: Report) -> str:
    figures = []
    by_label = {result.subject.label: result for result in report.results}
    for label, samples in final_samples(report):
        result = by_label.get(label)
        words = f"{result.subject.scheme}, {result.distance.psnr:.1f} dB" if result else "the model that it all starts from"
        figures.append(
            f'<figure><img alt="samples, {escape(label)}" src="{grid_uri(samples)}"><figcaption><b>{escape(label)}</b>{words}</figcaption></figure>'
        )
    return f'<h2>Images from the same noise</h2><div class="images">{"".join(figures)}</div>'


def grid_uri(samples: torch.Tensor) -> str:
    """Samples, float [n, C, H, W] in [-1, 1], as one picture in a data URI."""
    pixels = (images_from_sample(samples) * 255).round().astype(np.uint8)
    images = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image[..., :3]) for image in pixels]
    return png_uri(grid_of(images, columns=min(COLUMNS, len(images))))


def _curve(report: Report) -> str:
    series = {result.subject.label: result.distance.noise_errors for result in report.results}
    chart = curves(series, report.walk.timesteps, x_label="timestep, from noise to image", y_label="relative error of the predicted noise")
    return f"<h2>Error, step by step</h2>{chart}"


def _engines(report: Report) -> str:
    judged = [(result.subject, result.agreement) for result in report.results if result.subject.engine]
    rows = [_engine_row(subject, agreement) for subject, agreement in [*judged, *((subject, None) for subject in report.waiting)]]
    if not rows:
        return ""
    notes = [f"{result.subject.label}: {note}" for result in report.results for note in result.notes]
    notes += [f"{subject.label} was built ahead of time for {_gpu(subject)} and has not run on this machine." for subject in report.waiting]
    return (
        "<h2>Engines</h2>"
        '<p class="soft">Agreement: every quantized layer from the reference executor\'s own input. At a rounding tie two correct executors may be '
        "one code apart; what differs by more is counted as beyond a tie.</p>"
        + html_table(rows, numbers=("build", "codes compared", "ties", "beyond a tie", "largest output error"))
        + "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    )


def _engine_row(subject: EvaluationTarget, agreement: Sequence[SiteAgreement] | None) -> Row:
    engine = subject.engine
    assert engine is not None  # the caller chose the engines
    options = ", ".join(f"{name} {value}" for name, value in engine.build.get("options", {}).items() if value is not None)
    found = agreement_json(agreement) if agreement is not None else None
    return {
        "": subject.label,
        "plan": summary(engine.plan) + (f" ({options})" if options else ""),
        "build": time_words(float(engine.build.get("seconds", 0))),
        "codes compared": f"{found['codes']:,}" if found else None,
        "ties": f"{found['ties']:,}" if found else None,
        "beyond a tie": f"{found['beyond_a_tie']:,} ({100 * found['beyond_a_tie'] / max(found['codes'], 1):.2g} %)" if found else None,
        "largest output error": f"{max((site.output_error for site in agreement), default=0):.1e}" if agreement else None,
    }


def _gpu(subject: EvaluationTarget) -> str:
    assert subject.engine is not None  # only engines wait
    return str(subject.engine.build.get("options", {}).get("gpu") or subject.engine.backend)


def _bench(report: Report) -> str:
    if not report.bench:
        return ""
    numbers = [name for name, value in report.bench[0].items() if isinstance(value, int | float)]
    return "<h2>Speed</h2>" + html_table(report.bench, numbers=numbers)


def _tables(result: Result) -> str:
    artifact = result.subject.artifact
    assert artifact is not None  # statistics come from an artifact
    tables = {name: site.activation for name, site in artifact.sites.items() if site.activation}
    values = np.stack([table.scale.double().numpy() for table in tables.values()])
    timesteps = [float(timestep) for timestep in artifact.timesteps]
    chart = heat_map(values, list(tables), timesteps, x_label="timestep of the table row", value_label="input scale (log)")
    return (
        f"<h2>Scale table: {escape(result.subject.label)}</h2>"
        f'<p class="soft">{len(tables)} layers by {len(timesteps)} rows. A layer whose inputs shrink or grow along the trajectory has a row of changing colour.</p>{chart}'
    )


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
        parts.append(f"<details><summary>{escape(result.subject.label)}: {len(rows)} layers, the noisiest first</summary>{table}</details>")
    if not parts:
        return ""
    return (
        "<h2>Layers</h2>"
        "<p class=\"soft\">What each layer's quantized input looks like along the float model's trajectory: share of the codes in use, share of values outside the range, "
        f"and signal to quantization noise; means over the steps, then the worst step.</p>{''.join(parts)}"
    )


def _conditions(report: Report) -> str:
    parts = [definitions({**report.machine, **report.versions})]
    for result in report.results:
        facts = {"path": str(result.subject.path)}
        if result.subject.artifact and not result.subject.engine:
            facts |= {name: _words(name, value) for name, value in result.subject.artifact.provenance.items()}
        if result.subject.engine:
            facts |= {f"build {name}": _words(name, value) for name, value in result.subject.engine.build.items()}
        parts.append(f"<details><summary>{escape(result.subject.label)}: how it was made</summary>{definitions(facts)}</details>")
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
    """Names and values, one under the other."""
    return "<dl>" + "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()) + "</dl>"


def html_table(rows: Sequence[Row], *, numbers: Sequence[str] = (), dense: bool = False) -> str:
    """A table whose columns are the keys of the first row.

    Args:
        rows: Values by column.
        numbers: Columns that stand right.
        dense: Small type, for many rows.
    """

    def kind(index: int, name: str) -> str:
        return ' class="number"' if name in numbers else ' class="name"' if index == 0 and not dense else ""

    head = "".join(f"<th{kind(1, name)}>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td{kind(index, name)}>{escape(cell(row[name]))}</td>" for index, name in enumerate(rows[0])) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table{" class=" + chr(34) + "dense" + chr(34) if dense else ""}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

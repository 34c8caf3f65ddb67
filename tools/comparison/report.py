"""A comparison as an HTML page and as a markdown table, ranked by PSNR for each scheme."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from edm_deploy_tools.common.console import Row, size_words, time_words
from edm_deploy_tools.evaluation.charts import curves
from edm_deploy_tools.evaluation.report import STYLE, definitions, grid_uri, html_table

LEFT = ("#", "recipe")  # columns that are aligned left
DEFINED = {
    "PSNR": "PSNR of the final images in dB, each model on its own trajectory from the same noise; the peak is 2. Mean over the seeds of the "
    "recipe and of the samples; ± half the width of its 95 % interval over the images, by bootstrap; in parentheses the lowest and highest of the "
    "seeds. Rows are ranked by it",
    "weighted error": "squared error of the prediction at each step along the float model's trajectory, times the measured effect of an error at this step on "
    "the final sample, summed over the steps; in parentheses the rank by it",
    "noise error": "||e_q - e||^2 / ||e||^2 of the prediction along the float model's trajectory, over the first 64 samples, mean over the steps",
    "Frechet": "squared Frechet distance between the features of the float model's and the quantized model's final images",
    "time": "wall time of the process that quantized the model: start-up, loading, calibration, training, saving",
    "memory": "peak resident memory of that process",
    "size": "size of the artifact's directory",
    "integer": "share of the multiply-accumulates of all Conv2d and Linear layers whose weights and inputs are both integer codes",
    "INT4": "share of the same that backend cuda computes in INT4: layers whose weights and inputs all fit 4 bits; the other integer layers are INT8",
}


def ranked_rows(results: Mapping[str, Any], scheme: str) -> list[dict[str, Any]]:
    """One row for each recipe at a scheme, by PSNR, failed ones last; figures are means over the seeds.

    A row has `recipe`, `trains`, `cells` (one for each seed), and either `failed` or the figures by their names in results.json.
    """
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        if cell["scheme"] == scheme:
            by_recipe.setdefault(cell["recipe"], []).append(cell)
    rows = []
    for recipe, cells in by_recipe.items():
        good = [cell for cell in cells if "failed" not in cell]
        row: dict[str, Any] = {"recipe": recipe, "trains": cells[0]["trains"], "cells": cells}
        if not good:
            rows.append(row | {"failed": cells[0]["failed"]})
            continue
        row |= {
            name: fmean(cell[name] for cell in good)
            for name in (
                "weighted_error",
                "noise_error",
                "psnr_db",
                "frechet",
                "seconds",
                "peak_bytes",
                "bytes",
                "integer_share",
                "int4_share",
            )
        }
        for name in ("weighted_error_by_step", "noise_error_by_step"):
            row[name] = [fmean(step) for step in zip(*(cell[name] for cell in good), strict=True)]
        psnrs = [psnr for cell in good for psnr in cell["psnr_db_by_seed"]]
        row["spread"] = [min(psnrs), max(psnrs)]
        row["half_width"] = fmean((high - low) / 2 for low, high in (cell["psnr_interval"] for cell in good))
        row["seeds"] = len(good)
        rows.append(row)
    by_weighted = sorted(row["weighted_error"] for row in rows if "failed" not in row)
    for row in rows:
        if "failed" not in row:
            row["weighted_rank"] = 1 + by_weighted.index(row["weighted_error"])
    return sorted(rows, key=lambda row: -row.get("psnr_db", float("-inf")))


def schemes_in(results: Mapping[str, Any]) -> list[str]:
    """The schemes, in the requested order."""
    return list(dict.fromkeys(cell["scheme"] for cell in results["cells"]))


def table_of(results: Mapping[str, Any], scheme: str) -> list[Row]:
    """The formatted table of a scheme."""
    table: list[Row] = []
    for place, row in enumerate(ranked_rows(results, scheme), start=1):
        name = row["recipe"] + ("" if row["trains"] else " (no training)")
        if "failed" in row:
            blank = dict.fromkeys(("weighted error", "noise error", "Frechet", "time", "memory", "size", "integer", "INT4"))
            table.append({"#": None, "recipe": name, "PSNR, dB": "failed"} | blank)
            continue
        low, high = row["spread"]
        table.append(
            {
                "#": place,
                "recipe": name,
                "PSNR, dB": f"{row['psnr_db']:.1f} ± {row['half_width']:.1f}" + (f" ({low:.1f} to {high:.1f})" if low < high else ""),
                "weighted error": f"{row['weighted_error']:.3g} ({row['weighted_rank']})",
                "noise error": f"{row['noise_error']:.4f}",
                "Frechet": f"{row['frechet']:.3g}",
                "time": time_words(row["seconds"]),
                "memory": size_words(round(row["peak_bytes"])),
                "size": size_words(round(row["bytes"])),
                "integer": f"{100 * row['integer_share']:.1f} %",
                "INT4": f"{100 * row['int4_share']:.1f} %",
            }
        )
    return table


def failures(results: Mapping[str, Any]) -> list[str]:
    """The reason of each failed experiment, one line each."""
    return [f"{cell['recipe']} at {cell['scheme']}: {cell['failed']}" for cell in results["cells"] if "failed" in cell]


def describe_conditions(results: Mapping[str, Any]) -> str:
    """Model, budget, samples and machine of the comparison, in sentences."""
    request, machine = results["asked"], results["machine"]
    settings, seeds = request["setup"], request["seeds"]
    return (
        f"{Path(results['model']['name']).name}, {request['rows']} table rows, {time_words(request['budget'])} of calibration and training for each recipe that "
        f"trains{f', mean of {seeds} seeds' if seeds > 1 else ''}. Evaluated on {settings['samples'] * len(settings['seeds'])} samples in {settings['steps']} steps of "
        f"{results['walk']['scheduler']} from {_seeds(settings['seeds'])}, {_executor(request.get('engine'))}. {machine['cpu']}, {machine['cores']} cores, "
        f"torch {results['versions']['torch']}, {results['date'][:10]}. The Frechet distance of two "
        f"sets of {settings['samples'] * len(settings['seeds'])} samples of the float model, from different noise, is {results['frechet_floor']:.3g}."
    )


def _executor(backend: str | None) -> str:
    return "by the reference executor" if backend is None else f"in engines of {backend}, with float32 outside the quantized layers"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def command_of(results: Mapping[str, Any]) -> str:
    """The command line of this comparison."""
    request = results["asked"]
    settings = request["setup"]
    words = [
        "edm-deploy compare",
        shlex.quote(str(results["model"].get("asked") or results["model"]["name"])),
        f"--recipes {request['recipes']}",
        f"--bits {request['bits']}",
    ]
    words += [f"--budget {request['budget']:g}s", f"--rows {request['rows']}", f"--seeds {request['seeds']}"]
    words += [f"--samples {settings['samples']}", f"--steps {settings['steps']}", *(f"--seed {seed}" for seed in settings["seeds"])]
    words += [f"--preset {recipe}={preset}" for recipe, preset in request["presets"].items()]
    words += [f"--engine {request['engine']}"] if request.get("engine") else []
    return " ".join([*words, "--out DIR"])


def comparison_markdown(results: Mapping[str, Any]) -> str:
    """Conditions, one table for each scheme, and the failures, as markdown."""
    parts = [describe_conditions(results), f"`{command_of(results)}`"]
    for scheme in schemes_in(results):
        rows = table_of(results, scheme)
        head = list(rows[0])
        lines = [f"| {' | '.join([scheme if name == 'recipe' else name for name in head])} |"]
        lines.append("|" + "|".join("---" if name in LEFT else "---:" for name in head) + "|")
        lines += [f"| {' | '.join('' if row[name] is None else str(row[name]) for name in head)} |" for row in rows]
        parts.append("\n".join(lines))
    parts += ["\n".join(f"- {line}" for line in failures(results))] if failures(results) else []
    return "\n\n".join(parts) + "\n"


def comparison_html(results: Mapping[str, Any], images: Mapping[str, Tensor]) -> str:
    """One self-contained HTML page without scripts or external files.

    Args:
        results: Content of results.json.
        images: float [n, C, H, W] in [-1, 1], by `float` for the float model and by folder for the experiments.
    """
    title = f"{Path(results['model']['name']).name}: recipes compared"
    sections = [
        f'<h1>{escape(title)}</h1><p class="soft">{escape(describe_conditions(results))}</p><p><code>{escape(command_of(results))}</code></p>'
    ]
    sections += [_scheme(results, scheme, images) for scheme in schemes_in(results)]
    sections.append(f"<h2>Definitions</h2>{definitions(DEFINED)}")
    sections.append(f"<h2>Machine and versions</h2>{definitions({**results['machine'], **results['versions']})}{_provenance(results)}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>edm-deploy: {escape(title)}</title><style>{STYLE.read_text()}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _scheme(results: Mapping[str, Any], scheme: str, images: Mapping[str, Tensor]) -> str:
    table = table_of(results, scheme)
    rows = [row for row in ranked_rows(results, scheme) if "failed" not in row]
    notes = "".join(f'<p class="notes">{escape(line)}</p>' for line in failures(results) if f" at {scheme}:" in line)
    parts = [f"<h2>{scheme}</h2>", html_table(table, numbers=[name for name in table[0] if name not in LEFT]), notes]
    if rows:
        for name, label in (
            ("weighted_error_by_step", "expected change of the final sample"),
            ("noise_error_by_step", "relative error of the predicted noise"),
        ):
            series = {row["recipe"]: row[name] for row in rows}
            parts.append(curves(series, results["walk"]["timesteps"], x_label="timestep, from noise to image", y_label=label))
        parts.append(_images(rows, images))
    return "".join(parts)


def _images(rows: Sequence[Mapping[str, Any]], images: Mapping[str, Tensor]) -> str:
    shown = [("float", "the float model", images["float"])]
    for row in rows:
        folder = next(cell["folder"] for cell in row["cells"] if "failed" not in cell)
        if folder in images:
            shown.append((row["recipe"], f"{row['psnr_db']:.1f} dB, Frechet {row['frechet']:.3g}", images[folder]))
    figures = "".join(
        f'<figure><img alt="samples, {escape(name)}" src="{grid_uri(samples)}"><figcaption><b>{escape(name)}</b>{escape(words)}</figcaption></figure>'
        for name, words, samples in shown
    )
    return f'<div class="images">{figures}</div>'


def _provenance(results: Mapping[str, Any]) -> str:
    parts = []
    for cell in results["cells"]:
        made = cell["identity"]
        facts: dict[str, Any] = {
            "settings": ", ".join(f"{name} {value}" for name, value in made["settings"].items()),
            **{f"pass {name}": ", ".join(f"{key} {value}" for key, value in found.items()) for name, found in made["passes"].items()},
        }
        if made["budget_seconds"] is not None:
            facts["budget"] = time_words(made["budget_seconds"])
        if cell.get("steps_done"):
            facts["steps done"] = cell["steps_done"]
        name = f"{cell['recipe']}, {cell['scheme']}" + (f", seed {cell['seed']}" if cell["seed"] else "")
        parts.append(f"<details><summary>{escape(name)}</summary>{definitions(facts)}</details>")
    return "".join(parts)

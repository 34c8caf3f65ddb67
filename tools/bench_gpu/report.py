"""The page of `bench_gpu`, written after every stage: what each found, what was faster and slower than float16, where expected times were wrong."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS, PAGE, MEASURED = "results.json", "results.md", "measured.toml"
OVER_FLOAT = "ours with quantize, over float16"


def write(out: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results.json, results.md and, once layers have been measured, measured.toml into `out`.

    Args:
        out: An existing directory.
        results: By stage what its process wrote, or an `error`.
    """
    _replace(out / RESULTS, json.dumps(results, indent=1))
    _replace(out / PAGE, page(results))
    points = results.get("layers", {}).get("points", [])
    if points:
        _replace(out / MEASURED, measured_toml(points, str(results.get("versions", {}).get("facts", {}).get("gpu", "this GPU"))))


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results in markdown."""
    lines = ["# Kernels on this GPU", ""]
    lines += [f"- {sentence}" for sentence in summary(results)]
    for stage, found in results.items():
        lines += ["", f"## {stage}, {found.get('seconds', 0):.1f} s", ""]
        if "error" in found:
            lines.append(f"Failed: {found['error']}")
        lines += [f"**{problem}**\n" for problem in found.get("problems", ())]
        lines += [f"- {name}: {value}" for name, value in found.get("facts", {}).items()]
        for title, rows in found.get("tables", {}).items():
            lines += ["", f"### {title}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def summary(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What failed, what was faster, what was slower, and where the roofline was wrong; one sentence each."""
    found = [f"Stage {stage} failed: {result['error']}" for stage, result in results.items() if "error" in result]
    found += [problem for result in results.values() for problem in result.get("problems", ())]
    layers = [(title, row) for title, rows in results.get("layers", {}).get("tables", {}).items() for row in rows]
    for words, chosen in (
        ("faster", [row for _, row in layers if row[OVER_FLOAT] > 1]),
        ("slower", [row for _, row in layers if row[OVER_FLOAT] <= 1]),
    ):
        if chosen:
            far = max(chosen, key=lambda row: abs(row[OVER_FLOAT] - 1))
            found.append(
                f"{len(chosen)} of {len(layers)} layers are {words} than float16, quantization included; most: {far['layer']}, {far[OVER_FLOAT]}x."
            )
    for precision in ("float16", "int8", "int4"):
        ratios = [row[key] for _, row in layers if (key := f"{precision} of expected") in row]
        if ratios:
            found.append(
                f"{precision} layers take {statistics.median(ratios):.2f} times what the roofline expects (median; {min(ratios):.2f} to {max(ratios):.2f})."
            )
    for rows in results.get("model", {}).get("tables", {}).values():
        times = {row["way"]: row["ms"] for row in rows}
        if "ours" in times:
            found += [
                f"A whole step: ours {times['ours']} ms, {way} {ms} ms: {ms / times['ours']:.2f}x."
                for way, ms in times.items()
                if way != "ours"
            ]
    return found or ["Nothing was measured."]


def measured_toml(points: Sequence[Mapping[str, Any]], gpu: str) -> str:
    """Points in the form of engines/profiles/measured.toml. `error`: expected / measured rate - 1."""
    lines = [f"# Measured by bench_gpu on {gpu}. `error`: expected / measured rate - 1.\n"]
    for point in points:
        shape, seconds = point["shape"], point["seconds"]
        operations = 2 * shape["rows"] * shape["channels"] * shape["taps"] * shape["outputs"]
        inline = ", ".join(f"{name} = {value}" for name, value in shape.items())
        lines.append(
            f'[[bench]]\ngpu = "{gpu}"\nprecision = "{point["precision"]}"\nshape = {{ {inline} }}\n'
            f"tops = {operations / seconds / 1e12:.4g}\nerror = {seconds / point['expected'] - 1:+.2f}\n"
        )
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]


def _replace(path: Path, text: str) -> None:
    """Write a file such that it is never seen half written."""
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)

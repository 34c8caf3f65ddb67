"""Charts for an HTML page: curves and heat maps as inline SVG, images as inline PNG."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Evenly spaced anchors of viridis: dark is small, light is large, also in greyscale.
COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
SERIES = 12  # line colours that report.css defines, --series-0 to --series-11
CELL = 11  # pixels, height of a heat map's row


def png_uri(image: Image.Image) -> str:
    """A PNG data URI of an image."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def curves(series: Mapping[str, Sequence[float]], ticks: Sequence[float], *, x_label: str, y_label: str) -> str:
    """Line chart as SVG with a logarithmic y axis; each line is labelled at its end. Values that are not positive and finite are not drawn.

    Args:
        series: Values by name, each as long as `ticks`.
        ticks: Number shown at each position of the x axis.
        x_label: Label below the x axis.
        y_label: Label above the y axis.
    """
    width, height, left, top, bottom = 860, 320, 64, 28, 46
    right = 24 + max((round(7.4 * len(name)) for name in series), default=0)  # room for the longest label in 12 px bold
    series = {name: line for name, line in series.items() if any(map(_drawable, line))}
    values = [value for line in series.values() for value in line if _drawable(value)]
    if not values:
        return ""
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05

    def x(index: int) -> float:
        return left + (width - left - right) * index / max(len(ticks) - 1, 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(max(value, 10**low))) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)}">']
    for value in log_ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    every = max(1, math.ceil(len(ticks) / 10))
    for index in range(0, len(ticks), every):
        parts.append(f'<text class="tick" x="{x(index):.1f}" y="{height - bottom + 20}" text-anchor="middle">{ticks[index]:g}</text>')
    parts.append(f'<text class="axis" x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" x="{left}" y="{top - 12}">{escape(y_label)}</text>')
    label_heights = spread([y([value for value in line if _drawable(value)][-1]) for line in series.values()], gap=16)
    for order, ((name, line), label_y) in enumerate(zip(series.items(), label_heights, strict=True)):
        color = f"var(--series-{order % SERIES})"
        drawn = [(x(index), y(value)) for index, value in enumerate(line) if _drawable(value)]
        points = " ".join(f"{column:.1f},{line_y:.1f}" for column, line_y in drawn)
        parts.append(f'<polyline class="line" style="stroke:{color}" points="{points}"/>')
        parts += [f'<circle r="2.5" style="fill:{color}" cx="{column:.1f}" cy="{line_y:.1f}"/>' for column, line_y in drawn]
        parts.append(f'<text class="name" style="fill:{color}" x="{width - right + 10}" y="{label_y + 4:.1f}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _drawable(value: float) -> bool:
    return 0 < value < math.inf


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high: 1, 2 and 5 times each power of ten, or only the powers over many decades."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    candidates = [step * 10.0**decade for decade in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [value for value in candidates if low <= math.log10(value) <= high]


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """`heights` increased as little as makes any two differ by at least `gap`, in the order of the arguments."""
    placed = list(heights)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    return placed


def heat_map(values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[float], *, x_label: str, value_label: str) -> str:
    """Heat map as SVG of positive values on a logarithmic colour scale, with a colour bar below.

    Args:
        values: [rows, columns], each > 0.
        rows: Name of each row, from top to bottom.
        columns: Number shown at each column.
        x_label: Label below the x axis.
        value_label: Label of the colour bar.
    """
    left, right, top, width = 240, 16, 8, 860
    height_of_map = CELL * len(rows)
    low, high = float(np.log10(values).min()), float(np.log10(values).max())
    share = (np.log10(values) - low) / max(high - low, 1e-9)
    map_width = width - left - right
    height = top + height_of_map + 92
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(value_label)}">']
    parts.append(_pixels(share, left, top, map_width, height_of_map))
    parts += [
        f'<text class="site" x="{left - 8}" y="{top + CELL * (index + 0.78):.1f}" text-anchor="end">{escape(name)}</text>'
        for index, name in enumerate(rows)
    ]
    base = top + height_of_map
    for index in sorted({round(part * (len(columns) - 1) / 8) for part in range(9)}):
        position = left + map_width * (index + 0.5) / len(columns)
        parts.append(f'<text class="tick" x="{position:.1f}" y="{base + 16}" text-anchor="middle">{columns[index]:g}</text>')
    parts.append(f'<text class="axis" x="{left + map_width / 2}" y="{base + 34}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(_pixels(np.linspace(0, 1, 128)[None, :], left, base + 50, map_width, 10))
    parts.append(f'<text class="axis" x="{left - 8}" y="{base + 60}" text-anchor="end">{escape(value_label)}</text>')
    for value in [10**low, *log_ticks(low, high), 10**high]:
        position = left + map_width * (math.log10(value) - low) / max(high - low, 1e-9)
        at_an_end = value in (10**low, 10**high)
        if at_an_end or min(position - left, left + map_width - position) > 60:
            anchor = "start" if value == 10**low else "end" if value == 10**high else "middle"
            parts.append(f'<text class="tick" x="{position:.1f}" y="{base + 76}" text-anchor="{anchor}">{value:.2g}</text>')
    return "".join([*parts, "</svg>"])


def _pixels(share: NDArray[np.float64], x: float, y: float, width: float, height: float) -> str:
    uri = png_uri(Image.fromarray(colored(share)))
    return f'<image class="pixels" x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" href="{uri}"/>'


def colored(share: NDArray[np.float64]) -> NDArray[np.uint8]:
    """RGB colours, uint8 [rows, columns, 3], of shares in [0, 1]."""
    anchors = np.array(COLORS, dtype=np.float64)
    positions = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(share, positions, anchors[:, channel]) for channel in range(3)], axis=-1).round().astype(np.uint8)

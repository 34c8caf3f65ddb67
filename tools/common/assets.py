"""Paths of the data that is shipped with the tools."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
REFERENCE_MODEL = ASSETS / "ddpm-cifar10-automobile-32"

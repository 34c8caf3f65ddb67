"""Errors sown into source files."""

from __future__ import annotations

from pathlib import Path


def sow(file: Path, old: str, new: str) -> None:
    """Replace a text that the file holds exactly once."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} holds {old!r} {text.count(old)} times"
    file.write_text(text.replace(old, new))

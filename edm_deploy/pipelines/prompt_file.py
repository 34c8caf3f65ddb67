"""Read prompts from a text file."""

from __future__ import annotations

from pathlib import Path

from edm_deploy.errors import InputError


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line; empty lines are ignored.

    Raises:
        InputError: The file cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"--prompts {path} cannot be read ({err}). Expected a text file with one prompt a line.") from err
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompt. Expected a text file with one prompt a line.")
    return prompts

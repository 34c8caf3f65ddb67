"""GPU names as people type them, and the compute capability that an engine is built for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from edm_deploy.errors import UnsupportedError
from edm_deploy.lookup import suggestion

TABLE = Path(__file__).parent / "profiles" / "gpus.toml"


def capabilities(names: str) -> tuple[str, ...]:
    """Compute capabilities, `sm_86`, of one or more GPU names, each once.

    Args:
        names: `rtx3090`, `RTX 3090`, `sm_86`, `8.6`; several with commas.

    Raises:
        UnsupportedError: A name that is in no line of profiles/gpus.toml; the message has the nearest.
    """
    return tuple(dict.fromkeys(capability(name) for name in names.split(",")))


def capability(name: str) -> str:
    """Compute capability of one GPU name.

    Raises:
        UnsupportedError: As `capabilities`.
    """
    table: dict[str, list[str]] = tomllib.loads(TABLE.read_text())
    by_name = {gpu: sm for sm, gpus in table.items() for gpu in gpus}
    plain = re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
    number = re.fullmatch(r"(?:sm)?(\d+)\.?(\d)", plain)
    if number and (sm := f"sm_{number[1]}{number[2]}") in table:
        return sm
    if plain not in by_name:
        raise UnsupportedError(
            f"No GPU {name.strip()!r} is known.{suggestion(plain, [*by_name, *table])} Name its compute capability, {', '.join(table)}, or add it to {TABLE.name}."
        )
    return by_name[plain]

"""Range checks of settings."""

from __future__ import annotations

import math

from edm_deploy.errors import InputError


def at_least(name: str, value: float, lowest: float) -> None:
    """Raises InputError if a setting is below its minimum or not finite."""
    if not value >= lowest:
        raise InputError(f"{name} is {value}; expected at least {lowest}. Set another {name}.")
    if value == math.inf:
        raise InputError(f"{name} is {value}; expected a finite number, at least {lowest}. Set another {name}.")


def within(name: str, value: float, lowest: float, highest: float) -> None:
    """Raises InputError if a setting is outside its range."""
    if not lowest <= value <= highest:
        raise InputError(f"{name} is {value}; expected {lowest} to {highest}. Set another {name}.")

"""Recipes, backends and model families by file name: each folder is a registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from edm_deploy.errors import UnsupportedError


def names(package: ModuleType) -> list[str]:
    """Names in a registry: the package's modules without a leading underscore, with `-` for `_`. None of them is imported."""
    found = (m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg)
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def load(package: ModuleType, name: str, attribute: str) -> Any:  # the type of the attribute is the package's contract
    """`attribute` of module `name` in `package`, for example RECIPE of calibration.recipes.efficientdm.

    Args:
        package: The folder to look in, imported.
        name: A name as `names` lists it; `trt-rtx` and `trt_rtx` are equivalent.
        attribute: Name of the constant that each module of this package defines.

    Raises:
        UnsupportedError: No such module; the message lists the known names and the closest spelling.
    """
    known = names(package)
    wanted = name.replace("_", "-")
    if wanted not in known:
        raise UnsupportedError(
            f"No {attribute.lower()} {name!r} in {package.__name__}.{suggestion(wanted, known)} Known: {', '.join(known)}."
        )
    module = importlib.import_module(f"{package.__name__}.{wanted.replace('-', '_')}")
    return getattr(module, attribute)


def suggestion(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""

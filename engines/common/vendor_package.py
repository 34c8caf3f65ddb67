"""Import a vendor package, and refuse engines that another backend or another version of the package built."""

from __future__ import annotations

import importlib
from typing import Any

from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.manifest import Manifest


def vendor(module: str, *, remedy: str) -> Any:  # vendor packages carry no types
    """Import the vendor's module.

    Raises:
        UnsupportedError: It, or a library that it needs, is not installed; the message ends with `remedy`.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as err:  # OSError: a shared library of an installed package is missing
        raise UnsupportedError(f"{module} cannot be imported here ({err}). {remedy}") from err


def refuse_other_backend(manifest: Manifest, backend: str) -> None:
    """Raises UnsupportedError where the engine was built by another backend than the one that opens it."""
    if manifest.backend != backend:
        raise UnsupportedError(
            f"This engine was built by {manifest.backend} and cannot be opened with {backend}. Open it with {manifest.backend}."
        )


def refuse_other_build(manifest: Manifest, backend: str, package: str, version: str) -> None:
    """Refuse an engine of another backend or package version, before any of its files is read.

    The plan in the manifest was observed with one version; another may execute the same file differently, or fail to read it.

    Raises:
        UnsupportedError: The message names the version that built it and the remedy.
    """
    refuse_other_backend(manifest, backend)
    built_by = manifest.build.get("versions", {}).get(package)
    if built_by != version:
        raise UnsupportedError(
            f"This engine was built with {package} {built_by}; installed is {version}. "
            f"Build it again here with edm-deploy build-engine --backend {backend}, or install {package}=={built_by}."
        )

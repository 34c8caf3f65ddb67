"""What every backend asks of its vendor package: that it is there, and that it is the one that built the engine."""

from __future__ import annotations

import importlib
from typing import Any

from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.manifest import Manifest


def vendor(module: str, *, mend: str) -> Any:  # vendor packages carry no types
    """The vendor's module, imported.

    Raises:
        UnsupportedError: It is not installed, or a library that it needs is not; the message ends with `mend`.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as err:  # OSError: the package is there, one of its shared libraries is not
        raise UnsupportedError(f"{module} cannot be imported here ({err}). {mend}") from err


def refuse_other_backend(manifest: Manifest, backend: str) -> None:
    """Raises UnsupportedError where the engine was built by another backend than the one that opens it."""
    if manifest.backend != backend:
        raise UnsupportedError(
            f"This engine was built by {manifest.backend} and cannot be opened with {backend}. Open it with {manifest.backend}."
        )


def refuse_other_build(manifest: Manifest, backend: str, package: str, version: str) -> None:
    """Refuse an engine of another backend or version, before any of its files is read.

    The plan in the manifest says what was seen with one version; another may compute the same file in another way, or not read it at all.

    Raises:
        UnsupportedError: The message says what built it and how to mend it.
    """
    refuse_other_backend(manifest, backend)
    built_by = manifest.build.get("versions", {}).get(package)
    if built_by != version:
        raise UnsupportedError(
            f"This engine was built with {package} {built_by}; installed is {version}. "
            f"Build it again here with edm-deploy build-engine --backend {backend}, or install {package}=={built_by}."
        )

"""The floating-point type of `--precision`: one that the backend supports, its first where none is requested."""

from __future__ import annotations

from edm_deploy.errors import InputError
from edm_deploy.registry import suggestion
from edm_deploy.runtime.capabilities import BackendCapabilities


def supported_precision(requested: str | None, target: BackendCapabilities) -> str:
    """The requested floating-point type, `fp32`, `fp16` or `bf16`; the backend's default for None.

    Raises:
        InputError: The backend does not support it.
    """
    known = target.float_dtypes
    if requested is not None and requested not in known:
        raise InputError(f"--precision {requested!r}: {target.backend} has {' and '.join(known)}.{suggestion(requested, known)}")
    return requested or known[0]

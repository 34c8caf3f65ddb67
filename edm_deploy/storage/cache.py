"""Results that are computed once on a machine, in the cache folder of the Hugging Face libraries (`HF_ASSETS_CACHE`)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

from huggingface_hub import cached_assets_path

LIBRARY = "edm-deploy"


def cached_json(kind: str, key: Any, compute: Callable[[], Any], *, valid: Callable[[Any], bool]) -> Any:  # json
    """The result of `compute`, read from the cache where it was computed before.

    A folder that cannot be written, and a file that cannot be read or is not valid, only cost the computation.

    Args:
        kind: Namespace of the results.
        key: JSON content that the result depends on, in full.
        compute: Computes the result, JSON content.
        valid: Whether content of a file is such a result.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    try:
        path = cached_assets_path(LIBRARY, kind, "results") / f"{name}.json"
    except (OSError, ValueError):  # ValueError: a file is in place of the folder
        return compute()
    with contextlib.suppress(OSError, ValueError):
        if valid(found := json.loads(path.read_text())):
            return found
    result = compute()
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{name}.", delete=False) as stream:
            json.dump(result, stream)
        os.replace(stream.name, path)
    return result

"""Compiled code, cached under a name that stands for source, flags, compiler and target, in EDM_DEPLOY_CACHE, else in XDG_CACHE_HOME or ~/.cache under edm-deploy."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from edm_deploy.storage.leftovers import remove_leftovers, reserve, scratch_directory

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"  # prefix of the directories in the cache in which a file is written
SEAL = b"edm-deploy sha256 "  # follows cached code, before its checksum; what loads the code ignores what follows it


def cached_code(name: str, compile_now: Callable[[], bytes]) -> tuple[Path, bytes]:
    """Compiled code by a name that stands for everything it depends on, from the cache or compiled now: its path and content.

    The file ends with a checksum, which loaders of cubins and of shared libraries ignore.
    """
    path = cache_directory() / name
    if (code := _read(path)) is None:
        code = compile_now()
        path = _write(path, code)
    return path, code


def cache_directory(kind: str = "kernels") -> Path:
    """Directory of what is compiled for this machine, kernels or another kind; it may not exist yet."""
    if configured := os.environ.get("EDM_DEPLOY_CACHE"):
        return Path(configured) / kind
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home directory, as in some containers
        return _fallback("the user's cache directory", "there is no home directory") / kind
    return cache / "edm-deploy" / kind


def digest_of(settings: object, files: Mapping[str, bytes]) -> str:
    """32 hexadecimal digits that stand for source files, by name, and for the settings that they are compiled with."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, content in files.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def first_error(output: str) -> str:
    """The first line of a compiler's output that names an error, else its first line."""
    lines = [line.strip() for line in output.replace("\0", "").splitlines() if line.strip()]
    first = lines[0] if lines else "it gave no reason"
    return next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), first)


def _read(path: Path) -> bytes | None:
    """The content that `_write` wrote, or None where the file is missing, incomplete or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, seal = content[: -len(SEAL) - 32], content[-len(SEAL) - 32 :]
    if seal == SEAL + hashlib.sha256(code).digest():
        return code
    log.warning("%s is damaged; the kernels are compiled again.", path)
    return None


def _write(path: Path, code: bytes) -> Path:
    """Write `code` to `path` atomically, or to a temporary directory where `path` is not writable. Returns the location."""
    try:
        return _write_sealed(path, code)
    except OSError as err:
        return _write_sealed(_fallback(str(path.parent), err.strerror or str(err)) / path.name, code)


def _write_sealed(path: Path, code: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, UNFINISHED)
    with reserve(path.parent, UNFINISHED) as reservation:
        unfinished = reservation.directory / path.name
        unfinished.write_bytes(code + SEAL + hashlib.sha256(code).digest())
        os.replace(unfinished, path)
    return path


@functools.cache
def _fallback(directory: str, reason: str) -> Path:
    """A directory of this process only, reported once."""
    temporary = _until_exit.enter_context(scratch_directory("kernels"))
    log.warning(
        "Compiled kernels cannot be kept in %s (%s), so each process compiles them again. Set EDM_DEPLOY_CACHE to a directory that can be written.",
        directory,
        reason,
    )
    return temporary


_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)

"""Output directories: written completely or not at all, and replaced only where they hold nothing but what edm-deploy wrote."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from edm_deploy.errors import ArtifactError
from edm_deploy.storage.leftovers import INSIDE, Reservation, recover, reserve, swap_contents

IGNORED = ("lost+found",)  # of a file system's root
PROBED_BYTES = 1 << 20


@dataclass(frozen=True)
class DirectoryKind:
    """What a directory that edm-deploy writes is recognized by.

    Attributes:
        name: For messages: `an artifact`.
        marker: Name of the file that every such directory has; read where it is json.
        files: Glob patterns of the other names at its top level. Those that the marker lists under `files` need not be given.
        kind: Value of the marker's `kind`, where several kinds share the marker.
    """

    name: str
    marker: str
    files: tuple[str, ...] = ()
    kind: str | None = None

    def refusal(self, directory: Path) -> str | None:
        """Why `directory` may not be replaced by one of this kind, as a sentence about it; None if it may."""
        names = entries(directory)
        if not names:
            return None
        if self.marker not in names:
            return f"holds other files (no {self.marker})"
        description = _description(directory / self.marker)
        if self.kind is not None and description.get("kind", self.kind) != self.kind:
            return f"is not {self.name} ({self.marker} states kind {description['kind']!r})"
        listed = description.get("files")
        expected = [self.marker, *self.files, *(name.split("/")[0] for name in (listed if isinstance(listed, dict) else ()))]
        foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in expected)]
        return f"is {self.name} with {len(foreign)} other entries in it, such as {foreign[0]!r}" if foreign else None


def _description(marker: Path) -> dict[str, Any]:
    try:
        content = json.loads(marker.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def entries(directory: Path) -> list[str]:
    """Sorted names in a directory, without those that belong to runs of edm-deploy or to the file system; none if it does not exist."""
    return (
        sorted(path.name for path in directory.iterdir() if path.name not in IGNORED and not path.name.startswith((INSIDE, f".{INSIDE}")))
        if directory.is_dir()
        else []
    )


def replaces_contents(path: Path) -> bool:
    """Whether new contents are moved into the existing directory `path`, because it cannot be renamed: a mount point, the working directory."""
    target = path.resolve()
    return target.is_dir() and (_is_mount_point(target) or target == Path.cwd() or not os.access(target.parent, os.W_OK))


def _is_mount_point(path: Path) -> bool:
    """os.path.ismount, and bind mounts within one file system, which it does not recognize."""
    if os.path.ismount(path):
        return True
    try:
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except (OSError, IndexError):  # not Linux
        return False
    return str(path).replace(" ", "\\040") in points


def check_output(path: Path, *, kind: DirectoryKind, overwrite: bool = True, needed_bytes: int = PROBED_BYTES) -> None:
    """Refuse an output directory that cannot be written; called before long work.

    Args:
        path: Of the directory.
        kind: Of the directory that will be written.
        overwrite: Whether one of the same kind may be replaced.
        needed_bytes: Free space that is needed at least.

    Raises:
        ArtifactError: `path` is a file, a link to nothing, holds other files or another kind of directory, or the system refuses to write.
    """
    _check_content(path, kind, overwrite)
    with _explained(path):
        made = _make_parents(path.resolve())
        try:
            with _reserved(path) as reservation:
                _allocate(reservation.directory / "space", needed_bytes)
        finally:
            for parent in reversed(made):
                parent.rmdir()


@contextlib.contextmanager
def new_directory(path: Path, *, kind: DirectoryKind, overwrite: bool = True) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block succeeds and is removed when it fails.

    It is next to `path` and renamed; where that is impossible (`replaces_contents`), it is in `path`, and its contents replace the previous ones. A link
    to a directory stays one. What killed runs with the same `path` left is removed first; see `edm_deploy.storage.leftovers`.

    Args:
        path: Of the directory.
        kind: Of the directory; only one of the same kind, or an empty one, is replaced.
        overwrite: Whether it may be replaced.

    Raises:
        ArtifactError: `path` is something else, or the system refuses to write (disk full, no permission).
    """
    _check_link(path)
    recover(path.resolve())
    _check_content(path, kind, overwrite)
    with _explained(path):
        target = path.resolve()
        _make_parents(target)
        with _reserved(path) as reservation:
            yield reservation.directory
            _open_permissions(reservation.directory, reservation.file_mode)
            if reservation.directory.parent == target:
                swap_contents(reservation, target, entries(target), last=kind.marker)
            else:
                _rename(reservation, target)


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ArtifactError(f"{path} is a link to {os.readlink(path)}, which does not exist. Remove the link or choose another path.")


def _check_content(path: Path, kind: DirectoryKind, overwrite: bool) -> None:
    try:
        _check_link(path)
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} is a file; --out needs a directory. Choose another path.")
        names = entries(path)
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read: {err.strerror or err}. Choose another path.") from err
    if names and not overwrite:
        raise ArtifactError(f"{path} exists and is not empty. Choose another path.")
    if reason := kind.refusal(path):
        raise ArtifactError(f"{path} {reason}; nothing was written. Choose another path, or move away what is there.")


def _make_parents(target: Path) -> list[Path]:
    """Create the parents of `target`; those that did not exist, outermost first."""
    missing = [parent for parent in reversed(target.parents) if not parent.exists()]
    for parent in missing:
        parent.mkdir(exist_ok=True)
    return missing


def _reserved(path: Path) -> contextlib.AbstractContextManager[Reservation]:
    target = path.resolve()
    return reserve(target, INSIDE) if replaces_contents(target) else reserve(target.parent, f".{target.name}.")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise ArtifactError(
            f"Cannot write {path}: {err.strerror or err}. Nothing was left behind; free space or choose another path."
        ) from err


def _allocate(path: Path, size: int) -> None:
    """Reserve `size` bytes of disk for a moment; OSError where there is less."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        else:
            file.write(b"\0")
    path.unlink()


def _rename(reservation: Reservation, target: Path) -> None:
    try:
        if target.is_dir():
            target.rename(reservation.replaced)
        reservation.directory.rename(target)
    except BaseException:
        if reservation.replaced.is_dir() and not target.exists():
            reservation.replaced.rename(target)
        raise


def _open_permissions(directory: Path, file_mode: int) -> None:
    """Give every file at least the permissions of a new one: libraries write some for their owner alone."""
    directory_mode = stat.S_IMODE(directory.stat().st_mode)
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | (directory_mode if path.is_dir() else file_mode))

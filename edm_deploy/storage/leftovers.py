"""Temporary directories with a lock file next to each, so that the next run removes those of runs that were killed, and only those."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: without locks, live and dead runs cannot be distinguished, and nothing is removed
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK = ".lock"
REPLACED = ".old"  # a previous result, moved aside while the new one takes its place
COMPLETE = ".new"  # a complete new result whose files are being moved to where the previous ones were
SCRATCH = "edm-deploy-"
INSIDE = ".edm-deploy."  # prefix in an output directory that cannot be renamed


@dataclass(frozen=True)
class Reservation:
    """Names in a directory that belong to this run as long as its lock is held.

    Attributes:
        directory: For what the run writes; exists.
        replaced: For what the run replaces; does not exist yet.
        lock: The lock file. It exists as long as one of the other two may.
        file_mode: Permissions of a new file by the umask.
    """

    directory: Path
    replaced: Path
    lock: Path
    file_mode: int


@contextlib.contextmanager
def reserve(parent: Path, prefix: str, *, mode: int = 0o777) -> Iterator[Reservation]:
    """Create a directory `<prefix><token>` in `parent`, locked, and remove it at the end together with what was replaced.

    Args:
        parent: An existing directory.
        prefix: Of the names.
        mode: Of the directory, before the umask.

    Raises:
        OSError: The system refuses to write.
    """
    lock, descriptor = _new_lock(parent, prefix)
    stem = lock.name.removesuffix(LOCK)
    reservation = Reservation(parent / stem, parent / f"{stem}{REPLACED}", lock, stat.S_IMODE(os.fstat(descriptor).st_mode))
    try:
        reservation.directory.mkdir(mode=mode)
        yield reservation
    finally:
        shutil.rmtree(reservation.directory, ignore_errors=True)
        shutil.rmtree(reservation.replaced, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """A private directory in the system's temporary directory, removed at the end; the next run removes it where this one is killed.

    Args:
        purpose: Part of its name, `evaluate`.

    Raises:
        OSError: The system refuses to write.
    """
    parent = Path(tempfile.gettempdir())
    remove_leftovers(parent, SCRATCH)
    with reserve(parent, f"{SCRATCH}{purpose}-", mode=0o700) as reservation:
        yield reservation.directory


def recover(path: Path) -> None:
    """Remove what killed runs left next to `path` and in it, and settle a replacement of `path` in which one was killed."""
    remove_leftovers(path.parent, f".{path.name}.", target=path)
    remove_leftovers(path, INSIDE, target=path)


def swap_contents(reservation: Reservation, target: Path, names: Iterable[str], *, last: str) -> None:
    """Replace the contents of a directory that cannot be renamed. At no moment does it hold files of both results under a `last`.

    Args:
        reservation: In `target`; its directory holds the new contents.
        target: The directory.
        names: What is moved out of it.
        last: Name of the file without which the directory is not valid: moved out first and in last.
    """
    complete = reservation.directory.with_name(reservation.directory.name + COMPLETE)
    try:
        reservation.replaced.mkdir()
        for name in sorted(names, key=lambda name: name != last):
            (target / name).rename(reservation.replaced / name)
        reservation.directory.rename(complete)
        _move_contents(complete, target, last=last)
        complete.rmdir()
    except BaseException:  # Ctrl-C, or the system refuses
        _settle(complete, reservation.replaced, target)
        raise


def _move_contents(source: Path, target: Path, *, last: str | None = None) -> None:
    """Move what is in `source`: json files after the others, as one of them is what the others are not valid without, and `last` after all."""
    for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.suffix == ".json", path.name)):
        path.rename(target / path.name)


def remove_leftovers(parent: Path, prefix: str, *, target: Path | None = None) -> None:
    """Remove directories of `reserve` whose process has ended.

    Args:
        parent: Where they are.
        prefix: Beginning of their names; only a token, and for scratch directories a purpose, may follow.
        target: Restored from a previous result that was moved aside, where it does not exist.
    """
    if fcntl is None or not parent.is_dir():
        return
    names = re.compile(rf"{re.escape(prefix)}{'' if target else '[a-z-]*'}[0-9a-f]{{8}}{re.escape(LOCK)}")
    try:
        locks = sorted(path for path in parent.iterdir() if names.fullmatch(path.name))
    except OSError:  # a directory that may be written and not listed
        return
    for lock in locks:
        with contextlib.suppress(OSError), _dead(lock):
            _remove(lock, target)


def _remove(lock: Path, target: Path | None) -> None:
    stem = lock.name.removesuffix(LOCK)
    directory, replaced, complete = (lock.with_name(stem + suffix) for suffix in ("", REPLACED, COMPLETE))
    if target is not None and lock.parent == target:
        _settle(complete, replaced, target)
    elif target is not None and replaced.is_dir() and not target.exists():
        replaced.rename(target)
        log.warning("Restored %s, which an interrupted run was replacing.", target)
    left = [path.name for path in (directory, replaced) if path.exists()]
    for name in left:
        shutil.rmtree(lock.with_name(name), ignore_errors=True)
    lock.unlink(missing_ok=True)
    if left:
        log.warning("Removed %s in %s, left by an interrupted run.", " and ".join(left), lock.parent)


def _settle(complete: Path, replaced: Path, target: Path) -> None:
    """Finish `swap_contents` where it had begun to move new files in, else undo it."""
    if complete.is_dir():
        _move_contents(complete, target)
        complete.rmdir()
        log.warning("Completed %s, which an interrupted run was replacing.", target)
    elif replaced.is_dir() and any(replaced.iterdir()):
        _move_contents(replaced, target)
        log.warning("Restored %s, which an interrupted run was replacing.", target)


def _new_lock(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new lock file and its descriptor, which holds the lock."""
    while True:
        lock = parent / f"{prefix}{secrets.token_hex(4)}{LOCK}"
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            continue
        if fcntl is None:
            return lock, descriptor
        with contextlib.suppress(OSError):  # a file system without locks: others cannot lock it either, and leave it alone
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_open_as(lock, descriptor):
            return lock, descriptor
        os.close(descriptor)  # another run took it for a dead one before it was locked


@contextlib.contextmanager
def _dead(lock: Path) -> Iterator[None]:
    """Hold a lock that no process holds; raises OSError where one does, or where the file is not a file of this user."""
    descriptor = os.open(lock, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_open_as(lock, descriptor) or os.fstat(descriptor).st_uid != os.geteuid():
            raise FileNotFoundError(lock)
        yield
    finally:
        os.close(descriptor)


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False

"""A folder of shards while it is made: one run at a time, continued where a run was killed, complete when its description lists every shard."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.storage.directories import read_json, sha256_of, write_json
from edm_deploy.storage.leftovers import INSIDE
from edm_deploy.storage.output_directory import check_output
from edm_deploy_tools.common.machine import versions
from edm_deploy_tools.generation.plan import GenerationPlan, first_difference
from edm_deploy_tools.images.shards import IMAGE_SET, SET_FILE, ShardRange, fault_of, remove_parts, shard_files

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs with one --out are not noticed
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

SCHEMA = 1
LOCK = f"{INSIDE}generate.lock"
PART = f"{INSIDE}{SET_FILE}"  # the description while it is written


class ImageSet:
    """The folder of one plan's images.

    Attributes:
        directory: The folder.
        done: sha256 of each complete shard by range.

    Args:
        plan: The plan.
        directory: The folder, which `opened` has checked.
    """

    def __init__(self, plan: GenerationPlan, directory: Path) -> None:
        self.plan, self.directory = plan, directory
        self.done: dict[ShardRange, str] = {}

    @property
    def missing(self) -> list[ShardRange]:
        """The shards that are still to be made, in order."""
        return [wanted for wanted in self.plan.shards if wanted not in self.done]

    def describe(self) -> dict[str, Any]:
        """What images.json holds: settings, prompts, versions, and of a complete set the sha256 of every shard."""
        plan, complete = self.plan, not self.missing
        return {
            "schema": SCHEMA,
            "kind": IMAGE_SET.kind,
            "complete": complete,
            "num_images": plan.request.count,
            "settings": plan.settings(),
            "settings_digest": plan.settings_digest,
            "engine_path": str(plan.engine),
            "prompts": list(plan.request.prompts),
            "versions": versions(),
            "shards": {wanted.name(plan.shard_format): self.done[wanted] for wanted in plan.shards} if complete else {},
        }

    def write(self) -> None:
        """Write images.json, by another name first."""
        part = self.directory / PART
        write_json(part, self.describe())
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(self.directory / SET_FILE)

    def scan(self) -> None:
        """Find the complete shards; remove what a killed run left, damaged shards, and the last shard of a smaller set."""
        for name in remove_parts(self.directory):
            log.warning("Removed %s in %s, left by an interrupted run.", name, self.directory)
        (self.directory / PART).unlink(missing_ok=True)
        planned = set(self.plan.shards)
        for found, path in shard_files(self.directory).items():
            fault = fault_of(path, found, self.plan.settings_digest) if found in planned else ""
            if fault is None:
                self.done[found] = sha256_of(path)
            else:
                if fault:
                    log.warning("%s; it is made again.", fault.split(". Run edm-deploy")[0])
                path.unlink()


@contextlib.contextmanager
def opened(plan: GenerationPlan, out: Path, *, overwrite: bool = False) -> Iterator[ImageSet]:
    """The folder `out` for a plan, locked: new, or continued where it holds a part of the same set.

    Args:
        plan: The plan.
        out: The folder.
        overwrite: Whether a set in it is removed first.

    Raises:
        ArtifactError: It holds other files, or another run is writing it.
        InputError: It holds a set with other settings, or more images.
    """
    check_output(out, kind=IMAGE_SET)
    out.mkdir(parents=True, exist_ok=True)
    with _only_run(out):
        if overwrite:
            _clear(out)
        elif (out / SET_FILE).exists():
            _check_same(plan, read_json(out / SET_FILE, what="set of images"), out)
        images = ImageSet(plan, out)
        images.scan()
        images.write()
        yield images


def _check_same(plan: GenerationPlan, before: Mapping[str, Any], out: Path) -> None:
    remedy = "Give the same options to continue it, --overwrite to start again, or another --out."
    settings = before.get("settings")
    if before.get("schema") != SCHEMA or not isinstance(settings, dict):
        raise ArtifactError(f"{out / SET_FILE} is not one that this version wrote. Pass --overwrite, or another --out.")
    if difference := first_difference(settings, plan.settings()):
        raise InputError(f"--out {out} holds images of other settings: {difference}. {remedy}")
    if int(before.get("num_images", 0)) > plan.request.count:
        raise InputError(f"--out {out} holds a set of {before['num_images']} images, {plan.request.count} are requested. {remedy}")
    if before.get("versions") != versions():
        log.warning("%s was begun with other versions of packages (%s); its images may differ in rounding.", out, SET_FILE)


def _clear(out: Path) -> None:
    """Remove a set: its description last, so that what an interruption leaves is still one."""
    remove_parts(out)
    for path in shard_files(out).values():
        path.unlink()
    (out / SET_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process however that ends."""
    if fcntl is None:
        yield
        return
    path = out / LOCK
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
                raise BlockingIOError  # the run that held it has just ended, and a third one may have begun
        except OSError as err:
            raise ArtifactError(f"{out} is being written by another run. Wait for it, or choose another --out.") from err
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)

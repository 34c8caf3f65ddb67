"""Shards: files of generated images with prompts, seeds and digests, as WebDataset tar or Parquet, each written completely or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edm_deploy.errors import ArtifactError, first_line
from edm_deploy.storage.output_directory import DirectoryKind

ShardFormat = Literal["webdataset", "parquet"]
FORMATS: tuple[str, ...] = get_args(ShardFormat)
SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}
SET_FILE = "images.json"  # describes a folder of shards
IMAGE_SET = DirectoryKind("a set of generated images", SET_FILE, ("images-*.tar", "images-*.parquet", ".images-*.part"), kind="images")
PART = ".part"  # suffix of a shard that is being written
DIGITS = 9  # of an index in a name: names in alphabetical order are in order of the images
NAME = re.compile(rf"images-(\d{{{DIGITS}}})-(\d{{{DIGITS}}})(\.tar|\.parquet)")


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image of a shard.

    Attributes:
        index: Position in the whole set, from 0.
        seed: Seed of its noise.
        engine: sha256 of the engine's manifest.
        settings: sha256 of the settings that decide the images.
        prompt: Its prompt, for a text-conditional model.
        label: Its class, for a class-conditional model.
        png: The image, encoded.
    """

    index: int
    seed: int
    engine: str
    settings: str
    prompt: str | None = None
    label: int | None = None
    png: bytes

    def fields(self) -> dict[str, Any]:
        """All but the image, JSON values by name."""
        return {name: value for name, value in asdict(self).items() if name != "png"}


@dataclass(frozen=True, order=True)
class ShardRange:
    """The images of a shard, `start` to `stop - 1`."""

    start: int
    stop: int

    def name(self, shard_format: str) -> str:
        """File name of the shard."""
        return f"images-{self.start:0{DIGITS}d}-{self.stop:0{DIGITS}d}{SUFFIXES[shard_format]}"


def shard_ranges(count: int, size: int) -> list[ShardRange]:
    """The ranges of `count` images in shards of `size`, the last one of which may be smaller."""
    return [ShardRange(start, min(start + size, count)) for start in range(0, count, size)]


def shard_files(directory: Path) -> dict[ShardRange, Path]:
    """The complete shards in a directory by range, in order."""
    found = [(match, path) for path in directory.iterdir() if (match := NAME.fullmatch(path.name))]
    return dict(sorted((ShardRange(int(match[1]), int(match[2])), path) for match, path in found))


def remove_parts(directory: Path) -> list[str]:
    """Remove the files of shards whose writing was interrupted; returns their names."""
    parts = sorted(directory.glob(f".images-*{PART}"))
    for part in parts:
        part.unlink(missing_ok=True)
    return [part.name for part in parts]


def write_shard(path: Path, records: Sequence[ImageRecord], shard_format: str) -> None:
    """Write a shard: a file of another name, flushed to the disk, then renamed. The bytes depend on the records alone.

    Raises:
        OSError: The system refuses to write; nothing is left.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with part.open("wb") as stream:
            (_write_tar if shard_format == "webdataset" else _write_parquet)(stream, records)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_shard(path: Path) -> Iterator[ImageRecord]:
    """The images of a shard, in order.

    Raises:
        ArtifactError: The file is damaged, or holds other columns.
    """
    with _readable(path):
        yield from (_read_tar if path.suffix == SUFFIXES["webdataset"] else _read_parquet)(path)


def read_set(directory: Path) -> Iterator[ImageRecord]:
    """The images of a folder of shards, in order.

    Raises:
        ArtifactError: A shard is damaged, or images are missing or doubled.
    """
    following = 0
    for expected, path in shard_files(directory).items():
        if expected.start != following:
            raise ArtifactError(
                f"{directory} lacks the images from {following} on, or has them twice. Run edm-deploy generate again to complete it."
            )
        yield from read_shard(path)
        following = expected.stop


def fault_of(path: Path, expected: ShardRange, settings: str) -> str | None:
    """Why a file is not the complete shard of this range and these settings, as words; None if it is."""
    try:
        records = list(read_shard(path))
    except ArtifactError as err:
        return str(err)
    if [record.index for record in records] != list(range(expected.start, expected.stop)):
        return f"{path} holds other images than {expected.start} to {expected.stop - 1}"
    if any(record.settings != settings for record in records):
        return f"{path} was made with other settings"
    return None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, EOFError, tarfile.TarError) as err:
        raise ArtifactError(f"{path} cannot be read as a shard of images ({first_line(err)}). Run edm-deploy generate again.") from err


def _write_tar(stream: Any, records: Iterable[ImageRecord]) -> None:
    """WebDataset: `<index>.json` and `<index>.png` next to each other. Source: github.com/webdataset/webdataset, "The WebDataset Format"."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for record in records:
            for suffix, content in (("json", json.dumps(record.fields(), sort_keys=True).encode()), ("png", record.png)):
                entry = tarfile.TarInfo(f"{record.index:0{DIGITS}d}.{suffix}")  # no time and no user: equal images give an equal file
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _read_tar(path: Path) -> Iterator[ImageRecord]:
    with tarfile.open(path, "r:") as archive:
        fields: dict[str, Any] = {}
        for entry in archive:
            stream = archive.extractfile(entry)
            if stream is None:
                raise ValueError(f"{entry.name} is not a file")
            content = stream.read()
            if entry.name.endswith(".json"):
                fields = json.loads(content)
            else:
                if int(Path(entry.name).stem) != fields.get("index"):
                    raise ValueError(f"{entry.name} has no json of its own")
                yield ImageRecord(**fields, png=content)


def _write_parquet(stream: Any, records: Sequence[ImageRecord]) -> None:
    """Parquet with the image as a struct of `bytes` and `path`, as datasets of images have it."""
    import pyarrow
    from pyarrow import parquet

    text, integer = pyarrow.string(), pyarrow.int64()
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": text})
    types = {"index": integer, "seed": integer, "engine": text, "settings": text, "prompt": text, "label": integer}
    rows = [{**record.fields(), "image": {"bytes": record.png, "path": f"{record.index:0{DIGITS}d}.png"}} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema({**types, "image": image})), stream)


def _read_parquet(path: Path) -> Iterator[ImageRecord]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield ImageRecord(png=row.pop("image")["bytes"], **row)

"""The json files of directories, and the files of a source pipeline in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm_deploy.errors import ArtifactError, first_line
from edm_deploy.storage.json_schema import MAX_DEPTH, Timesteps, check_bounded, convert
from edm_deploy.storage.variants import variant_of

# From these a diffusers pipeline is rebuilt around its denoiser. Text encoders and VAE stay in the source pipeline.
INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
PIPELINE_FILES = (INDEX_FILE, SCHEDULER_FILE)
PIPELINE_NAMES = (INDEX_FILE, "scheduler")  # the same at the top level of a directory
MAX_JSON_BYTES = 64 << 20
AGAIN = "Copy or make it again."
SOURCE_KEY = "_name_or_path"  # written by diffusers into model_index.json: where the pipeline was loaded from
VARIANTS = ("*.fp16.*", "*.non_ema.*")  # further copies of the same weights, which are not loaded
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.onnx")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented json with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path, *, what: str, home: Path | None = None, finite: bool = False) -> dict[str, Any]:
    """The json object in `path`.

    Args:
        path: The file.
        what: Kind of its directory, for messages: `artifact`, `engine`.
        home: Directory that the file must be in even after its links are followed; None allows any link, as a hub cache consists of links.
        finite: Whether NaN and infinity are refused. diffusers writes infinity into scheduler configs (`lambda_min_clipped`).

    Raises:
        ArtifactError: No such file, not a regular file, too large, too deeply nested, or it holds no json object.
    """
    if not path.parent.exists():
        raise ArtifactError(f"{path.parent} does not exist; expected {_a(what)} directory. Check the path.")
    if not path.exists():
        raise ArtifactError(
            f"{path.parent} is no {what} directory: it has no {path.name}. Run `edm-deploy inspect` to see what a path holds."
        )
    check_regular(path, home=home)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES} of json. {AGAIN}")
        content = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path} cannot be read as json ({first_line(err)}). {AGAIN}") from err
    except RecursionError as err:
        raise ArtifactError(f"{path} is nested deeper than {MAX_DEPTH} levels, expected at most {MAX_DEPTH}. {AGAIN}") from err
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, expected a json object. {AGAIN}")
    try:
        check_bounded(content, finite=finite)
    except ArtifactError as err:
        raise ArtifactError(f"{path}: {err} {AGAIN}") from err
    return content


def check_regular(path: Path, *, home: Path | None = None) -> None:
    """Raises ArtifactError where an existing `path` is a pipe, a device or a directory, or a link to a file outside `home`."""
    if not path.is_file():
        raise ArtifactError(f"{path} is not a regular file, expected one. {AGAIN}")
    if home is not None and not path.resolve().is_relative_to(home.resolve()):
        raise ArtifactError(f"{path} is a link to {path.resolve()}, outside its directory. Copy the file itself, with `cp --dereference`.")


def _a(what: str) -> str:
    return f"{'an' if what[0].lower() in 'aeio' else 'a'} {what}"


def copy_pipeline_files(pipeline: Mapping[str, Any], directory: Path) -> None:
    """Write the source pipeline's json files, by relative path, below `directory`."""
    for name, content in pipeline.items():
        write_json(directory / name, content)


@dataclass(frozen=True)
class _Index:
    """What is read of a model_index.json that edm-deploy wrote."""

    _class_name: str
    scheduler: tuple[str, str]  # library and class


@dataclass(frozen=True)
class _SchedulerConfig:
    """What is read of a scheduler's config before diffusers builds tables of this length."""

    num_train_timesteps: Timesteps = 1000


def read_pipeline_files(directory: Path) -> dict[str, Any]:
    """The source pipeline's json files below `directory` by relative path, as far as they are there.

    Raises:
        ArtifactError: A file cannot be read, or lacks a field that rebuilding a pipeline needs.
    """
    files = [name for name in PIPELINE_FILES if (directory / name).exists()]
    contents = {name: read_json(directory / name, what="pipeline", home=directory) for name in files}
    for name, schema in ((INDEX_FILE, _Index), (SCHEDULER_FILE, _SchedulerConfig)):
        try:
            convert(contents.get(name, {}), schema) if name in contents else None
        except ArtifactError as err:
            raise ArtifactError(f"{directory / name}: {err} {AGAIN}") from err
    return contents


def other_components(index: Mapping[str, Any], component: str) -> list[str]:
    """Names of a pipeline's components in addition to denoiser and scheduler, from its model_index.json."""
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value and value[0]}
    return [name for name in parts if name not in ("scheduler", component)]


def copy_components(index: Mapping[str, Any], component: str, home: Path, directory: Path) -> list[str]:
    """Copy a pipeline's other components, weights as safetensors only, into `directory`.

    Args:
        index: The pipeline's model_index.json.
        component: Name of the denoiser, which is not copied.
        home: Directory of the pipeline.
        directory: Receives one directory for each component.

    Returns:
        Names of the components.

    Raises:
        ArtifactError: A component is missing.
    """
    names = components_at(home, index, component)
    for name in names:
        copies = () if variant_of(home / name) else VARIANTS
        shutil.copytree(home / name, directory / name, ignore=shutil.ignore_patterns(*PICKLES, *copies))
    return names


def components_at(home: Path, index: Mapping[str, Any], component: str) -> list[str]:
    """`other_components`, each checked to have a directory in `home`; ArtifactError where one has none."""
    names = other_components(index, component)
    if missing := [name for name in names if not (home / name).is_dir()]:
        raise ArtifactError(f"{home} has no {missing[0]!r}, which a {index.get('_class_name')} needs. Download or save the pipeline again.")
    return names


def sha256_of(path: Path) -> str:
    """sha256 hex of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

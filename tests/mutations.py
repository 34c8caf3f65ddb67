"""Seeded mutations of json and of tensors, with hashes and digests computed again so that the checks behind them are reached."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from edm_deploy.artifact.artifact import JSON_NAME, TENSORS_NAME
from edm_deploy.errors import EdmDeployError
from edm_deploy.runtime.manifest import NAME
from edm_deploy.storage.directories import sha256_of

SECONDS = 60  # per mutation, on a busy machine; the faults that this finds took minutes or all memory
MEMORY = 4 << 30  # bytes of address space that one mutation may add


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Write artifact.json with the tensors' sha256 and the digest that belong to it."""
    description = description | {"tensors_sha256": sha256_of(directory / TENSORS_NAME)}
    covered = {key: description.get(key) for key in ("family", "config", "sites")} | {"tensors": description["tensors_sha256"]}
    covered |= {key: description[key] for key in ("folded", "structure") if description.get(key)}
    description["digest"] = hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
    (directory / JSON_NAME).write_text(json.dumps(description))


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write manifest.json with the sha256 of each file that it lists and that exists."""
    files = content.get("files")
    if isinstance(files, dict):
        present = {name: sha256_of(directory / name) for name in files if (directory / name).is_file() and ".." not in name}
        content = content | {"files": files | present}
    (directory / NAME).write_text(json.dumps(content))


# One of each kind of wrong value: types, signs, infinities, numbers that would allocate, depths, paths.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    255,
    65536,
    2**31,
    2**53,
    10**12,
    10**30,
    -(10**12),
    0.5,
    -0.0,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "batch",
    "../outside",
    "/dev/zero",
    "conv2d",
    "fp16",
    "W4A4",
    "sm_90",
    "\ud800",
    "9" * 5000,
    [],
    [0],
    [[0]],
    [1, 2, 3],
    [1e300] * 4,
    list(range(1000)),
    {},
    {"a": 1},
    {"": {}},
    {"min": 1, "opt": 1, "max": 10**12},
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value below `content`, eight levels deep."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in entries if len(path) < 8 for place in [(*path, key), *places(value, (*path, key))]]


def mutated(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy in which one to three values are exchanged, removed, doubled, renamed or nested."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # First a depth, then a place: the few fields at the top are hit as often as the many below.
        by_depth: dict[int, list[tuple[Any, ...]]] = {}
        for place in places(content):
            by_depth.setdefault(len(place), []).append(place)
        if not by_depth:
            break
        *path, key = rng.choice(by_depth[rng.choice(sorted(by_depth))])
        holder = content
        for step in path:
            holder = holder[step]
        _change(holder, key, rng)
    return content


def _change(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = rng.choice(("value", "value", "value", "remove", "rename", "wrap", "deep", "scale" if number else "value", "double"))
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(("x", "../x", "", f"{key}x", key.upper()))] = holder.pop(key)
    elif kind == "wrap":
        holder[key] = rng.choice(([value], {"x": value}, str(value)))
    elif kind == "deep":
        holder[key] = nested(rng.choice((10, 40, 300)))
    elif kind == "scale":
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 1000, value * 10**9, float(value)))
    elif kind == "double" and isinstance(value, list):
        holder[key] = value * rng.choice((2, 100))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    content: list[Any] = []
    for _ in range(depth):
        content = [content]
    return content


def flip_bytes(path: Path, rng: random.Random) -> None:
    """Change, cut or extend a file."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "head", "cut", "extend", "empty", "brackets"))
    if kind == "flip":
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "head":  # of a safetensors file, the length of its header; of a json file, its first keys
        data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "extend":
        data += bytes(rng.randrange(1, 100))
    elif kind == "empty":
        data.clear()
    else:
        data[:] = b"[" * rng.choice((100, 5000, 200_000))
    path.write_bytes(data)


def replace_file(path: Path, rng: random.Random) -> None:
    """Put something else in the place of a file: a pipe, a folder, a link out of the directory, a link to a device, nothing."""
    path.unlink()
    kind = rng.choice(("pipe", "folder", "link", "device", "loop", "missing"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(__file__)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError where the block takes longer than SECONDS, and lets allocations beyond MEMORY fail."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def expired(*_: object) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, expired)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(load: Callable[[], object]) -> str:
    """`loaded`, `refused`, or what else happened, which is a fault.

    A message that quotes Python's own words is a fault too: it names no remedy.
    """
    try:
        with bounded():
            load()
    except EdmDeployError as err:
        message = str(err)
        python = ("Error(", "object has no attribute", "argument", "NoneType", "unhashable", "not subscriptable", "<class")
        quoted = next((words for words in python if words in message), None)
        return f"quotes Python: {message}" if quoted else f"not one line: {message}" if "\n" in message else "refused"
    except Exception as err:
        return f"{type(err).__name__}: {err}"
    return "loaded"


def mutated_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """A copy in which one tensor is exchanged, removed, renamed, reshaped, cast, cut or holds extreme values."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.choice(("remove", "rename", "flat", "cast", "cut", "grow", "extreme", "empty", "more"))
    if kind == "remove":
        del tensors[name]
    elif kind == "rename":
        tensors[rng.choice(("x", f"{name}.x", f"params.{name}", f"sites.{name}", ""))] = tensors.pop(name)
    elif kind == "flat":
        tensors[name] = value.reshape(rng.choice(((-1,), (1, -1), (-1, 1))))
    elif kind == "cast":
        tensors[name] = value.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.int8, torch.bool, torch.uint8)))
    elif kind == "cut":
        tensors[name] = value.reshape(-1)[: max(value.numel() // 2, 1)].clone()
    elif kind == "grow":
        tensors[name] = torch.cat([value.reshape(-1)] * 3)
    elif kind == "extreme":
        extremes = (float("nan"), float("inf"), -1.0, 0.0) if value.is_floating_point() else (-128, 127, 100)
        tensors[name] = torch.full_like(value, rng.choice(extremes)) if value.dtype != torch.uint8 else ~value
    elif kind == "empty":
        tensors[name] = value.new_zeros(0)
    else:
        tensors["extra"] = torch.zeros(3)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}

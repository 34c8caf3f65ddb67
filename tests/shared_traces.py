"""Float graphs for the tests: each ONNX graph is traced once by whichever process needs it first, then read from `.pytest_cache/traces`.

A trace takes seconds and an export of a tiny model is almost nothing else. The key holds the sources that decide a graph and the versions of the packages
that make it, so that a change of either traces anew. `test_shared_traces.py` compares a stored graph with a fresh one in every run.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch.export import ExportedProgram

from edm_deploy.export import trace as tracing
from edm_deploy.network import float_program
from edm_deploy.network.family import Config, Family
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".pytest_cache" / "traces"
SOURCES = ("edm_deploy/network", "edm_deploy/models", "edm_deploy/export")
DAY = 24 * 3600  # seconds
PACKAGES = ("torch", "diffusers", "onnx-ir", "onnxscript")
trace, exported_program = tracing.trace, float_program.exported_program  # the functions themselves, before they are replaced


@functools.cache
def versions() -> str:
    """Digest of the sources and package versions that decide a graph."""
    digest = hashlib.sha256(" ".join([sys.version, *(importlib.metadata.version(name) for name in PACKAGES)]).encode())
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def key(family: Family, config: Config, structure: NetworkRewrite, *dtypes: torch.dtype | None) -> str:
    """What distinguishes one graph from another within one state of the sources."""
    return json.dumps(
        [type(family).__module__, type(family).__name__, config, structure.to_json(), [str(dtype) for dtype in dtypes]], sort_keys=True
    )


@functools.cache
def folder() -> Path:
    """Where the graphs of the present sources and versions are stored. Those of others are removed once they are a day old."""
    found = FOLDER / versions()[:16]
    if not found.is_dir():
        for other in FOLDER.glob("*"):
            if other.is_dir() and time.time() - other.stat().st_mtime > DAY:
                shutil.rmtree(other, ignore_errors=True)
        found.mkdir(parents=True, exist_ok=True)
    return found


def path_of(wanted: str) -> Path:
    """Where the graph of this key is stored."""
    return folder() / f"{hashlib.sha256(wanted.encode()).hexdigest()[:32]}.onnx"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_graphs: dict[str, bytes] = {}
_programs: dict[str, ExportedProgram] = {}


def shared_trace(family: Family, config: Config, dtype: torch.dtype, structure: NetworkRewrite = PUBLISHED) -> ir.Model:
    """`edm_deploy.export.trace.trace`, from the cache. A family from elsewhere than `edm_deploy.models` is traced: its source is in no key."""
    source = sys.modules[type(family).__module__].__file__ or ""
    if not Path(source).is_relative_to(ROOT / "edm_deploy"):
        return trace(family, config, dtype, structure)
    wanted = key(family, config, structure, dtype)
    if wanted not in _graphs:
        path = path_of(wanted)
        with locked(path):
            if not path.is_file():
                scratch = path.with_suffix(f".{os.getpid()}")
                scratch.write_bytes(ir.to_proto(trace(family, config, dtype, structure)).SerializeToString())
                scratch.replace(path)
        _graphs[wanted] = path.read_bytes()
    return ir.from_proto(onnx.ModelProto.FromString(_graphs[wanted]))


def shared_program(
    family: Family, config: Config, dtype: torch.dtype, *, input_dtype: torch.dtype | None = None, structure: NetworkRewrite = PUBLISHED
) -> ExportedProgram:
    """`edm_deploy.network.float_program.exported_program`, once a process; whoever reads a program leaves it as it is."""
    wanted = key(family, config, structure, dtype, input_dtype or dtype)
    if wanted not in _programs:
        _programs[wanted] = exported_program(family, config, dtype, input_dtype=input_dtype, structure=structure)
    return _programs[wanted]


def share_traces(patch: pytest.MonkeyPatch) -> None:
    """Let every module of ours that traces take the shared graphs."""
    import edm_deploy.artifact.fold_pre_scales
    import edm_deploy.export.onnx
    import engines.from_artifact.packed_engine

    for module in (tracing, engines.from_artifact.packed_engine, edm_deploy.artifact.fold_pre_scales):
        patch.setattr(module, "exported_program", shared_program)
    patch.setattr(edm_deploy.export.onnx, "trace", shared_trace)

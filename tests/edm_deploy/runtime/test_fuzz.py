"""Mutated ONNX and engine directories are opened, and then run, or refused in one line, in bounded time and memory."""

import json
import random
import shutil

import pytest
from safetensors.torch import load_file, save_file

from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import NAME, ShapeRange
from engines import backend_named, build_engine
from tests.conftest import tiny_inputs
from tests.mutations import flip_bytes, mutated, mutated_tensors, outcome, replace_file, write_manifest

# Which share of the mutations each directory gets: opening a cuda or cpu engine traces its model.
COUNTS = {"onnx": 80, "ort": 80, "openvino": 12, "cuda": 8, "cpu": 4}


@pytest.fixture(scope="module")
def directories(onnx_w4a4, artifact_w4a4, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    profile = {"batch": ShapeRange(1, 2, 4)}
    for backend in ("ort", "openvino"):
        build_engine(onnx_w4a4, root / backend, backend=backend, options=BuildOptions(profile=profile, threads=1))
    artifact_w4a4.save(root / "artifact")
    build_engine(root / "artifact", root / "cuda", backend="cuda", options=BuildOptions(profile=profile, gpu="sm_86"))
    build_engine(root / "artifact", root / "cpu", backend="cpu", options=BuildOptions(profile=profile, threads=1))
    shutil.copytree(onnx_w4a4, root / "onnx")
    return root


def mutate(directory, rng):
    """One mutation of the manifest, the pipeline's files, the tensors, the bytes of a file or a file itself."""
    manifest = json.loads((directory / NAME).read_text())
    files = sorted(manifest["files"])
    kind = rng.choice(("manifest",) * 7 + ("json", "bytes", "file", "tensors"))
    if kind == "manifest":
        return write_manifest(directory, mutated(manifest, rng))
    if kind == "file":
        return replace_file(directory / rng.choice([NAME, *files]), rng)
    path = directory / rng.choice([NAME, *files])
    if kind == "tensors" and (tensors := sorted(directory.glob("*.safetensors"))):
        save_file(mutated_tensors(load_file(tensors[0]), rng), tensors[0])
    elif kind == "json" and path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
    else:
        flip_bytes(path, rng)
    if path.name != NAME:
        write_manifest(directory, manifest)
    return None


def use(directory, kind):
    """Open a directory as its command would; an engine is run once, for what passes the checks must run."""
    if kind == "onnx":
        backend_named("ort").read(directory)
        return
    denoiser = load_denoiser(directory, device="cpu")
    denoiser.run(tiny_inputs("unet2d", batch=2))


def faults(directories, kind, tmp_path, seeds):
    outcomes = {}
    for seed in seeds:
        directory = shutil.copytree(directories / kind, tmp_path / str(seed))
        mutate(directory, random.Random(f"{kind} {seed}"))
        outcomes[seed] = outcome(lambda directory=directory: use(directory, kind))
        shutil.rmtree(directory)
    return {seed: found for seed, found in outcomes.items() if found not in ("loaded", "refused")}


@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_directories_are_opened_or_refused(directories, kind, tmp_path):
    use(directories / kind, kind)
    assert faults(directories, kind, tmp_path, range(COUNTS[kind])) == {}


@pytest.mark.extended
@pytest.mark.parametrize("kind", COUNTS)
def test_many_mutated_directories_are_opened_or_refused(directories, kind, tmp_path):
    assert faults(directories, kind, tmp_path, range(1000, 1000 + (300 if kind in ("cuda", "cpu") else 1900))) == {}

"""Mutated artifacts are loaded or refused in one line, in bounded time and memory."""

import json
import random
import shutil

import pytest
from safetensors.torch import load_file, save_file

from edm_deploy.artifact.artifact import JSON_NAME, TENSORS_NAME, Artifact
from tests.mutations import flip_bytes, mutated, mutated_tensors, outcome, replace_file, write_description

FILES = (JSON_NAME, TENSORS_NAME, "model_index.json", "scheduler/scheduler_config.json")


@pytest.fixture(scope="module")
def saved(artifact_w4a4, tmp_path_factory):
    return artifact_w4a4.save(tmp_path_factory.mktemp("fuzz") / "artifact")


def mutate(directory, rng):
    """One mutation of the description, the pipeline's files, the tensors, the bytes of a file or a file itself."""
    kind = rng.choice(("description",) * 6 + ("pipeline", "tensors", "bytes", "file"))
    if kind == "description":
        write_description(directory, mutated(json.loads((directory / JSON_NAME).read_text()), rng))
    elif kind == "pipeline":
        path = directory / rng.choice(FILES[2:])
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
    elif kind == "tensors":
        save_file(mutated_tensors(load_file(directory / TENSORS_NAME), rng), directory / TENSORS_NAME)
        write_description(directory, json.loads((directory / JSON_NAME).read_text()))
    elif kind == "bytes":
        path = directory / rng.choice(FILES)
        flip_bytes(path, rng)
        if path.name == TENSORS_NAME:
            write_description(directory, json.loads((directory / JSON_NAME).read_text()))
    else:
        replace_file(directory / rng.choice(FILES), rng)


def faults(saved, tmp_path, seeds):
    outcomes = {}
    for seed in seeds:
        directory = shutil.copytree(saved, tmp_path / str(seed))
        mutate(directory, random.Random(seed))
        outcomes[seed] = outcome(lambda directory=directory: Artifact.load(directory))
        shutil.rmtree(directory)
    assert {"loaded", "refused"} <= set(outcomes.values())
    return {seed: found for seed, found in outcomes.items() if found not in ("loaded", "refused")}


def test_mutated_artifacts_are_loaded_or_refused(saved, tmp_path):
    assert faults(saved, tmp_path, range(120)) == {}


@pytest.mark.extended
def test_many_mutated_artifacts_are_loaded_or_refused(saved, tmp_path):
    assert faults(saved, tmp_path, range(1000, 5000)) == {}

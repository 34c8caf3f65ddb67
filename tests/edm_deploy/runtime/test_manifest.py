import json
import shutil

import pytest

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.runtime.manifest import NAME, SCHEMA, Manifest, ShapeRange


@pytest.fixture
def directory(onnx_w4a4, tmp_path):
    return shutil.copytree(onnx_w4a4, tmp_path / "onnx")


def change(directory, **entries):
    content = json.loads((directory / NAME).read_text())
    (directory / NAME).write_text(json.dumps(content | entries))


def test_what_is_written_is_read_again(directory):
    manifest = Manifest.read(directory, kind="onnx")
    again = manifest.write(directory, list(manifest.files))
    assert again == manifest == Manifest.read(directory, kind="onnx")


def test_the_dynamic_dimensions_are_named_once(directory):
    assert Manifest.read(directory, kind="onnx").dynamic_dims == ("batch", "height", "width")


@pytest.mark.parametrize("profile", [(0, 1, 2), (2, 1, 3), (1, 5, 4)])
def test_a_range_is_ordered(profile):
    with pytest.raises(InputError, match="expected 1 <= MIN <= OPT <= MAX"):
        ShapeRange(*profile)


def test_an_onnx_directory_is_no_engine(directory):
    with pytest.raises(ArtifactError, match=r"holds an onnx, expected an engine directory\. Run edm-deploy build-engine"):
        Manifest.read(directory, kind="engine")


def test_a_newer_schema_asks_for_a_newer_version(directory):
    change(directory, schema=SCHEMA + 1)
    with pytest.raises(ArtifactError, match="Install a newer edm-deploy"):
        Manifest.read(directory, kind="onnx")


def test_a_missing_file_is_named(directory):
    (directory / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing, but manifest\.json lists it"):
        Manifest.read(directory, kind="onnx")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_file_outside_the_directory_is_refused(directory, name):
    change(directory, files={name: "0" * 64})
    with pytest.raises(ArtifactError, match="lies outside its directory"):
        Manifest.read(directory, kind="onnx")


@pytest.mark.parametrize(
    "entries",
    [{"inputs": 3}, {"surprise": 1}, {"profile": {"batch": {"min": 5, "opt": 1, "max": 1}}}, {"files": None}, {"files": {"model.onnx": 3}}],
    ids=str,
)
def test_a_manifest_that_nobody_wrote_is_one_clear_error(directory, entries):
    change(directory, **entries)
    with pytest.raises(ArtifactError):
        Manifest.read(directory, kind="onnx")

import json
import shutil

import pytest

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.runtime.manifest import NAME, SCHEMA, Manifest, ShapeRange
from edm_deploy.storage.directories import sha256_of


@pytest.fixture
def directory(onnx_w4a4, tmp_path):
    return shutil.copytree(onnx_w4a4, tmp_path / "onnx")


def written(directory):
    return json.loads((directory / NAME).read_text())


def change(directory, **entries):
    (directory / NAME).write_text(json.dumps(written(directory) | entries))


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
    change(directory, files=written(directory)["files"] | {name: "0" * 64})
    with pytest.raises(ArtifactError, match="is outside its directory"):
        Manifest.read(directory, kind="onnx")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"inputs": 3}, "inputs is 3, expected an array"),
        ({"surprise": 1}, 'The file has a field "surprise", expected kind, artifact'),
        ({"profile": {"batch": {"min": 5, "opt": 1, "max": 1}}}, r"profile\.batch: shape profile 5:1:1: expected 1 <= MIN <= OPT <= MAX"),
        (
            {"profile": {"batch": {"min": 1, "opt": 1, "max": 10**12}}},
            r"profile\.batch\.max is 1000000000000, expected an integer <= 65536",
        ),
        ({"files": None}, "files is null, expected an object"),
        ({"files": {}}, "files is an object of 0 entries, expected an object of length >= 1"),
        ({"files": {"model.onnx": 3}}, r'files\["model\.onnx"\] is 3, expected a string'),
        ({"files": {"other.onnx": "0" * 64}}, "does not list 'model.onnx' among its files"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000, expected an integer <= 100000"),
        ({"num_train_timesteps": True}, "num_train_timesteps is true, expected an integer"),
        ({"relaxed": [[0, 10**12]]}, "relaxed timesteps 0 to 1000000000000 are outside a schedule of 1000"),
        ({"relaxed": [[0, True]]}, r"relaxed\[0\]\[1\] is true, expected an integer"),
        ({"dtype": "fp64"}, 'dtype is "fp64", expected "fp16" or "fp32"'),
        ({"family": "unet9d"}, "No family 'unet9d'"),
        ({"config": {"sample_size": 8}}, "config has no field 'in_channels', which UNet2DModel needs"),
        ({"structure": {"segments": {"conv_in": [1, "2"]}}}, r'structure\.segments\.conv_in\[1\] is "2", expected an integer'),
        ({"folded": {"layers": "conv_in"}}, 'folded.layers is "conv_in", expected an array'),
        ({"outputs": []}, "outputs is an array of 0 entries, expected an array of length >= 1"),
    ],
    ids=str,
)
def test_a_field_that_no_export_writes_is_named_and_refused(directory, entries, message):
    change(directory, **entries)
    with pytest.raises(ArtifactError, match=message):
        Manifest.read(directory, kind="onnx")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("in_channels", "x", r"config\.\w+ has a value that UNet2DModel cannot have"),
        ("sample_size", 10**12, r"config\.sample_size is 1000000000000, expected a number below 2\^31"),
    ],
)
def test_a_config_that_the_family_cannot_read_is_refused(directory, field, value, message):
    change(directory, config=written(directory)["config"] | {field: value})
    with pytest.raises(ArtifactError, match=message):
        Manifest.read(directory, kind="onnx")


def test_a_listed_file_that_links_elsewhere_is_refused(directory, tmp_path):
    (directory / "model.onnx").rename(tmp_path / "model.onnx")
    (directory / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="outside its directory"):
        Manifest.read(directory, kind="onnx")


def test_an_endless_scheduler_is_refused(directory):
    config = directory / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": 10**12}))
    manifest = written(directory)
    change(directory, files=manifest["files"] | {"scheduler/scheduler_config.json": sha256_of(config)})
    with pytest.raises(ArtifactError, match=r"scheduler_config\.json: num_train_timesteps is 1000000000000, expected an integer <= 100000"):
        Manifest.read(directory, kind="onnx")

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy.storage.directories import copy_components, read_json, write_json


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "d" / "x.json", {"a": [1, 2]})
    assert read_json(tmp_path / "d" / "x.json", what="artifact") == {"a": [1, 2]}


def test_components_are_copied_without_pickles_and_second_copies(tmp_path):
    index = {"_class_name": "P", "unet": ["d", "U"], "scheduler": ["d", "S"], "vae": ["d", "V"], "safety_checker": [None, None]}
    (tmp_path / "home" / "vae").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "model.fp16.safetensors", "model.bin"):
        (tmp_path / "home" / "vae" / name).write_text("x")
    assert copy_components(index, "unet", tmp_path / "home", tmp_path / "to") == ["vae"]
    assert {path.name for path in (tmp_path / "to" / "vae").iterdir()} == {"config.json", "model.safetensors"}


def test_a_component_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="has no 'vae', which a P needs"):
        copy_components({"_class_name": "P", "vae": ["d", "V"]}, "unet", tmp_path, tmp_path / "to")

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy.storage.directories import copy_components, new_directory, read_json, write_json

MARKER = "ours.json"


def test_a_directory_appears_only_when_the_block_ends_well(tmp_path):
    with new_directory(tmp_path / "a" / "b", marker=MARKER) as directory:
        (directory / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_the_block_is_interrupted(tmp_path, error):
    def interrupted():
        with new_directory(tmp_path / "a", marker=MARKER) as directory:
            (directory / "x").write_text("1")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_previous_result_is_replaced_and_kept_when_the_block_fails(tmp_path):
    for text in ("old", "new"):
        with new_directory(tmp_path / "a", marker=MARKER) as directory:
            (directory / MARKER).write_text(text)
    assert (tmp_path / "a" / MARKER).read_text() == "new"
    with pytest.raises(RuntimeError), new_directory(tmp_path / "a", marker=MARKER):
        raise RuntimeError
    assert (tmp_path / "a" / MARKER).read_text() == "new"


def test_a_file_at_the_target_is_reported(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ArtifactError, match="is a file; --out needs a directory"), new_directory(tmp_path / "a", marker=MARKER):
        pass


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "a").mkdir()
    with new_directory(tmp_path / "a", marker=MARKER) as directory:
        (directory / MARKER).write_text("")
    assert (tmp_path / "a" / MARKER).exists()


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Cannot write"), new_directory(tmp_path / "file" / "a", marker=MARKER):
        pass


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

import json

import pytest
import torch

from calibration.run.checkpoint import JSON_NAME, TENSORS_NAME, load_checkpoint, save_checkpoint
from edm_deploy.errors import ArtifactError

IDENTITY = {"recipe": "efficientdm", "settings": {"steps": 10, "rank": 4}, "teacher": "abc"}
TENSORS = {"a": torch.arange(3.0), "b": torch.tensor(7)}


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "ck", step=5, identity=IDENTITY, tensors=TENSORS)
    return tmp_path / "ck"


def test_loading_undoes_saving(checkpoint):
    step, tensors = load_checkpoint(checkpoint, IDENTITY)
    assert step == 5
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_a_later_checkpoint_replaces_the_earlier_one_and_leaves_nothing_else(checkpoint):
    save_checkpoint(checkpoint, step=6, identity=IDENTITY, tensors=TENSORS)
    assert load_checkpoint(checkpoint, IDENTITY)[0] == 6
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["ck"]
    assert sorted(path.name for path in checkpoint.iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_another_setting_is_refused_by_name(checkpoint):
    with pytest.raises(ArtifactError, match="another run: rank is 4 there and 8 here"):
        load_checkpoint(checkpoint, IDENTITY | {"settings": {"steps": 10, "rank": 8}})


def test_another_teacher_is_refused(checkpoint):
    with pytest.raises(ArtifactError, match="teacher is 'abc' there and 'xyz' here"):
        load_checkpoint(checkpoint, IDENTITY | {"teacher": "xyz"})


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no checkpoint to resume"):
        load_checkpoint(tmp_path, IDENTITY)


def test_a_flipped_byte_is_detected(checkpoint):
    data = bytearray((checkpoint / TENSORS_NAME).read_bytes())
    data[-1] ^= 1
    (checkpoint / TENSORS_NAME).write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        load_checkpoint(checkpoint, IDENTITY)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"step": "x", "identity": IDENTITY}), json.dumps({"identity": 3})])
def test_a_damaged_description_ends_in_an_artifact_error(checkpoint, content):
    (checkpoint / JSON_NAME).write_text(content)
    with pytest.raises(ArtifactError):
        load_checkpoint(checkpoint, IDENTITY)


def test_another_directory_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="holds other files"):
        save_checkpoint(tmp_path, step=1, identity=IDENTITY, tensors=TENSORS)

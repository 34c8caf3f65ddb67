import json

import pytest
import torch

from calibration.run.checkpoint import (
    JSON_NAME,
    TENSORS_NAME,
    TrainingState,
    load_checkpoint,
    restore,
    resume_training,
    save_checkpoint,
    save_training,
)
from calibration.run.options import Run, RunOptions
from calibration.run.time_budget import Budget
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


def run_in(directory, **options):
    return Run(options=RunOptions(checkpoint=directory, **options), identity=IDENTITY, on_progress=lambda progress: None)


def state_of(budget=None):
    """A state in which every group has a tensor named `a`."""
    groups = {group: {"a": torch.tensor([float(number)])} for number, group in enumerate(("parameters", "trajectories", "method"))}
    return TrainingState(step=3, **groups, budget=budget)


def test_a_training_state_comes_back_group_by_group_with_the_numbers_of_the_notes(tmp_path):
    run = run_in(tmp_path / "ck")
    run.notes.update(layers=7, std=0.1, groups=["attention"])
    save_training(run, state_of())
    resumed = run_in(tmp_path / "ck", resume=True)
    state = resume_training(resumed)
    assert (state.step, state.budget) == (3, None)
    assert [dict(group) for group in (state.parameters, state.trajectories, state.method)] == [
        {"a": torch.tensor([n])} for n in (0.0, 1.0, 2.0)
    ]
    # Lists follow from the settings; recipes set them again.
    assert resumed.notes == {"layers": 7, "std": 0.1}
    assert type(resumed.notes["layers"]) is int


def test_a_resumed_training_has_used_as_much_of_its_budget_as_the_saved_one(tmp_path):
    save_training(run_in(tmp_path / "ck"), state_of(Budget(1000.0, used=400.0)))
    budget = resume_training(run_in(tmp_path / "ck", resume=True)).budget
    assert budget.seconds == 1000.0
    assert 400.0 <= budget.used() < 700.0  # the clock goes on meanwhile


def test_a_run_without_a_directory_saves_nothing_and_one_without_resume_starts_anew(tmp_path):
    save_training(run_in(None), state_of())
    save_training(run_in(tmp_path / "ck"), state_of())
    assert resume_training(run_in(tmp_path / "ck")) is None


def test_a_restored_parameter_has_new_memory_in_the_old_layout():
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(weight)
    restore({"a": parameter}, {"a": torch.ones(2, 3, 4, 4)})
    assert bool((parameter == 1).all()) and not bool((weight == 1).any())
    assert parameter.is_contiguous(memory_format=torch.channels_last)

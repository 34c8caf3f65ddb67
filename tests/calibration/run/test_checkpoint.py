import json

import pytest
import torch

from calibration.run.checkpoint import (
    JSON_NAME,
    TENSORS_NAME,
    TrainingState,
    check_not_overwritten,
    holds_checkpoint,
    load_checkpoint,
    restore,
    resume_training,
    save_checkpoint,
    save_training,
)
from calibration.run.options import Run, RunOptions
from calibration.run.time_budget import Budget
from edm_deploy.errors import ArtifactError, InputError

IDENTITY = {"recipe": "efficientdm", "settings": {"steps": 10, "rank": 4}, "teacher": "abc"}
DESCRIPTION = {"step": 5, "identity": IDENTITY}
TENSORS = {"a": torch.arange(3.0), "b": torch.tensor(7)}


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "ck", description=DESCRIPTION, tensors=TENSORS)
    return tmp_path / "ck"


def test_loading_undoes_saving(checkpoint):
    step, tensors = load_checkpoint(checkpoint, IDENTITY)
    assert step == 5
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_a_later_checkpoint_replaces_the_earlier_one_and_leaves_nothing_else(checkpoint):
    save_checkpoint(checkpoint, description=DESCRIPTION | {"step": 6}, tensors=TENSORS)
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
        save_checkpoint(tmp_path, description=DESCRIPTION, tensors=TENSORS)


def run_in(directory, **options):
    return Run(options=RunOptions(checkpoint=directory, **options), identity=IDENTITY, on_progress=lambda progress: None)


def state_of(budget=None):
    """A state in which every group has a tensor named `a`."""
    groups = {group: {"a": torch.tensor([float(number)])} for number, group in enumerate(("parameters", "trajectories", "method"))}
    return TrainingState(step=3, **groups, budget=budget)


def test_a_training_state_comes_back_group_by_group_with_the_numbers_of_the_notes(tmp_path):
    run = run_in(tmp_path / "ck")
    run.notes.update(layers=7, std=0.1, groups=["attention"])
    save_training(run, state_of(), position="step 3 of 10", finished=False)
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
    save_training(run_in(tmp_path / "ck"), state_of(Budget(1000.0, used=400.0)), position="step 3 of 10", finished=False)
    budget = resume_training(run_in(tmp_path / "ck", resume=True)).budget
    assert budget.seconds == 1000.0
    assert 400.0 <= budget.used() < 700.0  # the clock goes on meanwhile


def test_a_run_without_a_directory_saves_nothing_and_one_without_resume_starts_anew(tmp_path):
    save_training(run_in(None), state_of(), position="step 3 of 10", finished=False)
    save_training(run_in(tmp_path / "ck"), state_of(), position="step 3 of 10", finished=False)
    assert resume_training(run_in(tmp_path / "ck")) is None


def test_a_restored_parameter_has_new_memory_in_the_old_layout():
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(weight)
    restore({"a": parameter}, {"a": torch.ones(2, 3, 4, 4)})
    assert bool((parameter == 1).all()) and not bool((weight == 1).any())
    assert parameter.is_contiguous(memory_format=torch.channels_last)


REFUSAL = r"ck is the checkpoint of an unfinished run: efficientdm, step 3 of 10\. Continue it with --resume, or remove the directory to start anew\."


def test_a_run_that_would_overwrite_the_checkpoint_of_an_unfinished_one_is_refused(tmp_path):
    save_training(run_in(tmp_path / "ck"), state_of(), position="step 3 of 10", finished=False)
    with pytest.raises(InputError, match=REFUSAL):
        check_not_overwritten(RunOptions(checkpoint=tmp_path / "ck"))
    check_not_overwritten(RunOptions(checkpoint=tmp_path / "ck", resume=True))
    check_not_overwritten(RunOptions(checkpoint=tmp_path / "another"))
    check_not_overwritten(RunOptions())


def test_the_checkpoint_of_a_finished_training_is_overwritten_unless_its_artifact_is_missing(tmp_path):
    save_training(run_in(tmp_path / "ck"), state_of(), position="step 3 of 10", finished=True)
    check_not_overwritten(RunOptions(checkpoint=tmp_path / "ck"))
    with pytest.raises(InputError, match=REFUSAL):
        check_not_overwritten(RunOptions(checkpoint=tmp_path / "ck"), finished_too=True)


def test_a_checkpoint_of_an_older_version_is_described_by_its_step(checkpoint):
    description = json.loads((checkpoint / JSON_NAME).read_text())
    (checkpoint / JSON_NAME).write_text(json.dumps({key: description[key] for key in ("step", "identity", "sha256")}))
    with pytest.raises(InputError, match="unfinished run: efficientdm, step 5\\. Continue"):
        check_not_overwritten(RunOptions(checkpoint=checkpoint))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"identity": 3}'])
def test_a_checkpoint_that_cannot_be_read_is_not_overwritten_either(checkpoint, content):
    (checkpoint / JSON_NAME).write_text(content)
    with pytest.raises(InputError, match="unfinished run: its description cannot be read\\. Continue"):
        check_not_overwritten(RunOptions(checkpoint=checkpoint))


def test_a_checkpoint_directory_with_other_files_is_refused_before_the_run(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="holds other files"):
        check_not_overwritten(RunOptions(checkpoint=tmp_path))


def test_a_checkpoint_that_a_killed_run_was_replacing_is_restored_and_found(checkpoint):
    checkpoint.rename(checkpoint.with_name(".ck.0123abcd.old"))
    checkpoint.with_name(".ck.0123abcd.lock").touch()
    assert holds_checkpoint(checkpoint)
    assert load_checkpoint(checkpoint, IDENTITY)[0] == 5

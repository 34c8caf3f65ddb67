import pytest

from calibration.run.options import RunOptions
from edm_deploy.errors import InputError


def test_resume_without_a_directory_is_refused():
    with pytest.raises(InputError, match="no checkpoint directory"):
        RunOptions(resume=True)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(InputError, match="budget_seconds is 0; expected above 0"):
        RunOptions(budget_seconds=0)


def test_an_unknown_dtype_of_the_teacher_is_refused():
    with pytest.raises(InputError, match="teacher_dtype is 'fp16'; expected bf16, fp32, bf16-autocast"):
        RunOptions(teacher_dtype="fp16")


def test_checkpoints_after_no_steps_are_refused():
    with pytest.raises(InputError, match="checkpoint_every is 0; expected at least 1"):
        RunOptions(checkpoint_every=0)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_checkpoints_after_no_time_or_never_are_refused(seconds):
    with pytest.raises(InputError, match=f"checkpoint_seconds is {seconds}; expected above 0 and finite"):
        RunOptions(checkpoint_seconds=seconds)

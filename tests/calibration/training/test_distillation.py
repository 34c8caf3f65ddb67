import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from calibration import Interrupted, RunOptions, fit
from calibration.recipes.efficientdm import EfficientDM
from calibration.run.checkpoint import load_checkpoint
from calibration.training import divergence
from calibration.training.distillation import TrainingSchedule
from edm_deploy.errors import ArtifactError, InputError
from tests.calibration.tiny import tiny_source

SETTINGS = {"rows": 4, "steps": 6, "batch": 4, "calibration_samples": 4, "rank": 2, "update_rate": 0.01, "step_weighting": 0.5}


def interrupted_at(step, number=signal.SIGINT):
    """A progress callback that raises a signal, Ctrl-C by default, after `step` training steps."""

    def on_progress(progress):
        if progress.stage == "finetune" and progress.step == step:
            signal.raise_signal(number)  # handled before it returns; os.kill may deliver it to another thread

    return on_progress


def test_rates_rise_and_fall_linearly():
    schedule = TrainingSchedule(steps=10, batch=1, warmup=0.2)
    assert [round(schedule.factor(step / 10), 3) for step in (0, 1, 5, 9)] == [0.5, 0.9, 0.5, 0.1]
    assert TrainingSchedule(steps=10, batch=1).factor(0) == 1.0


def test_a_cosine_falls_slowly_at_first_and_at_the_end():
    schedule = TrainingSchedule(steps=10, batch=1, decay="cosine")
    assert [round(schedule.factor(share), 3) for share in (0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 0.854, 0.5, 0.146, 0.0]


def test_rates_of_a_longer_training_are_lower_by_the_root_of_its_length():
    assert TrainingSchedule(steps=400, batch=1, scale_rates_to=100).factor(0) == pytest.approx(0.5)
    under_a_budget = TrainingSchedule(steps=400, batch=1, scale_rates_to=100)
    assert under_a_budget.factor(0.5, 1600.0) == pytest.approx(0.5 * 0.25)  # 1600 steps are expected, half of the time is used
    assert TrainingSchedule(steps=400, batch=1).factor(0, 1600.0) == 1.0


def test_the_average_of_the_first_steps_forgets_the_initial_values():
    schedule = TrainingSchedule(steps=10, batch=1, ema=0.99)
    assert [schedule.average_decay(step) for step in (1, 8, 10_000)] == [2 / 11, 0.5, 0.99]


def trained_tables(recipe, **options):
    artifact = fit(tiny_source(), recipe, RunOptions(teacher_dtype="fp32", **options))
    return torch.cat([site.activation.scale.log() for site in artifact.sites.values()])


def test_the_average_replaces_what_was_trained():
    settings = SETTINGS | {"compute": "fp32", "scale_rate": 0.01, "decay": "cosine"}
    before, last, averaged = (
        trained_tables(EfficientDM(**settings | change))
        for change in ({"steps": 1, "scale_rate": 0.0}, {"steps": 2}, {"steps": 2, "ema": 0.9})
    )
    moved = (last - before).abs() > 1e-3
    assert bool(moved.any())
    share = (averaged - before)[moved] / (last - before)[moved]
    assert 0.5 < float(share.median()) < 1.0  # 1 without an average, 0 for the initial values


def test_an_interrupted_and_resumed_average_is_that_of_the_whole_run(tmp_path):
    recipe, source = EfficientDM(**SETTINGS | {"steps": 4}, ema=0.9), tiny_source()
    whole = fit(source, recipe, RunOptions())
    with pytest.raises(Interrupted):
        fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupted_at(2))
    assert fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True)).digest == whole.digest


@pytest.mark.parametrize("kind", ["unet2d", pytest.param("unet2d-classes", marks=pytest.mark.extended)])
def test_an_interrupted_and_resumed_run_ends_in_the_same_artifact(kind, tmp_path):
    recipe, source = EfficientDM(**SETTINGS), tiny_source(kind)
    whole = fit(source, recipe, RunOptions())
    options = {"checkpoint": tmp_path / "ck", "checkpoint_every": 2}
    with pytest.raises(Interrupted, match=r"after step 3 of 6; the state is in .*--resume"):
        fit(source, recipe, RunOptions(**options), on_progress=interrupted_at(3))
    steps = []
    resumed = fit(source, recipe, RunOptions(**options, resume=True), on_progress=lambda progress: steps.append(progress.step))
    assert steps == [4, 5, 6]
    assert resumed.digest == whole.digest


def test_resuming_leaves_the_float_model_as_it_is(tmp_path):
    """Calibration moves biases; what a checkpoint brings back must not land in the teacher's, which are the student's until then."""
    recipe, source = EfficientDM(**SETTINGS, bias_correction=True), tiny_source()
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    options = {"checkpoint": tmp_path / "ck", "teacher_dtype": "fp32"}
    whole = fit(source, recipe, RunOptions(teacher_dtype="fp32"))
    with pytest.raises(Interrupted):
        fit(source, recipe, RunOptions(**options), on_progress=interrupted_at(3))
    assert fit(source, recipe, RunOptions(**options, resume=True)).digest == whole.digest
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())


def test_a_finished_run_can_be_resumed_and_ends_at_once_in_the_same_artifact(tmp_path):
    recipe, source = EfficientDM(**SETTINGS | {"steps": 2}), tiny_source()
    whole = fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck"))
    assert fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True)).digest == whole.digest


def test_ctrl_c_without_a_checkpoint_directory_states_that_nothing_was_saved():
    with pytest.raises(Interrupted, match="nothing was saved"):
        fit(tiny_source(), EfficientDM(**SETTINGS), RunOptions(), on_progress=interrupted_at(1))


def test_sigterm_writes_a_checkpoint_like_ctrl_c_and_the_run_can_be_resumed(tmp_path):
    recipe, source = EfficientDM(**SETTINGS), tiny_source()
    whole = fit(source, recipe, RunOptions())
    with pytest.raises(Interrupted, match="after step 3 of 6; the state is in"):
        fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupted_at(3, signal.SIGTERM))
    assert fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True)).digest == whole.digest


def test_a_run_in_the_background_is_not_interrupted_by_ctrl_c():
    """A shell starts background jobs with SIGINT ignored; the terminal's Ctrl-C is meant for another job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        steps = []
        fit(
            tiny_source(),
            EfficientDM(**SETTINGS | {"steps": 2}),
            RunOptions(),
            on_progress=lambda progress: steps.append(progress.step) or signal.raise_signal(signal.SIGINT),
        )
        assert steps[-1] == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_with_another_seed_does_not_overwrite_the_checkpoint_of_an_interrupted_one(tmp_path):
    options = RunOptions(checkpoint=tmp_path / "ck")
    with pytest.raises(Interrupted):
        fit(tiny_source(), EfficientDM(**SETTINGS), options, on_progress=interrupted_at(1))
    with pytest.raises(
        InputError, match=r"ck is the checkpoint of an unfinished run: efficientdm, step 1 of 6\. Continue it with --resume"
    ):
        fit(tiny_source(), EfficientDM(**SETTINGS, seed=1), options)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        fit(tiny_source(), EfficientDM(**SETTINGS), RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupted_at(1))
    with pytest.raises(ArtifactError, match="rank is 2 there and 3 here"):
        fit(tiny_source(), EfficientDM(**SETTINGS | {"rank": 3}), RunOptions(checkpoint=tmp_path / "ck", resume=True))


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path):
    recipe = EfficientDM(**SETTINGS)
    with pytest.raises(Interrupted):
        fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupted_at(1))
    with pytest.raises(ArtifactError, match="teacher is"):
        fit(tiny_source("unet2d-classes"), recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True))


def copies_of_checkpoints(directory, copies):
    """A progress callback that copies the checkpoint after each training step: what a run that is killed then leaves behind."""

    def on_progress(progress):
        if progress.stage == "finetune" and directory.is_dir():
            shutil.copytree(directory, copies / f"after-{progress.step}")

    return on_progress


def test_a_run_that_is_killed_after_a_periodic_checkpoint_resumes_to_the_result_of_a_run_without_checkpoints(tmp_path):
    recipe, source, options = EfficientDM(**SETTINGS), tiny_source(), {"checkpoint_seconds": 1e-6}
    on_progress = copies_of_checkpoints(tmp_path / "ck", tmp_path / "copies")
    saving = fit(source, recipe, RunOptions(checkpoint=tmp_path / "ck", **options), on_progress=on_progress)
    # The callback of a step comes before its checkpoint.
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == [f"after-{step}" for step in range(2, 7)]
    steps = []
    options = RunOptions(checkpoint=tmp_path / "copies" / "after-4", resume=True)
    resumed = fit(source, recipe, options, on_progress=lambda progress: steps.append(progress.step))
    assert steps == [4, 5, 6]
    assert resumed.digest == saving.digest == fit(source, recipe, RunOptions()).digest


@pytest.mark.extended
def test_a_run_that_sigkill_ends_resumes_to_the_same_result(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from tests.calibration.training.test_distillation import SETTINGS, EfficientDM, RunOptions, fit, tiny_source

def kill(progress):
    if progress.stage == "finetune" and progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

fit(tiny_source(), EfficientDM(**SETTINGS), RunOptions(checkpoint=Path({str(tmp_path / "ck")!r}), checkpoint_seconds=1e-6), on_progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    recipe, steps = EfficientDM(**SETTINGS), []
    options = RunOptions(checkpoint=tmp_path / "ck", resume=True)
    resumed = fit(tiny_source(), recipe, options, on_progress=lambda progress: steps.append(progress.step))
    assert steps == [4, 5, 6]
    assert resumed.digest == fit(tiny_source(), recipe, RunOptions()).digest


def test_no_checkpoint_is_written_before_it_is_due(tmp_path):
    seen = []
    fit(
        tiny_source(),
        EfficientDM(**SETTINGS | {"steps": 2}),
        RunOptions(checkpoint=tmp_path / "ck"),
        on_progress=lambda _: seen.append((tmp_path / "ck").exists()),
    )
    assert not any(seen)
    assert (tmp_path / "ck").is_dir()  # the last step's


def test_checkpoints_are_written_every_so_many_steps(tmp_path):
    seen = []

    def look(progress):
        if progress.stage == "finetune" and progress.step > 2:
            seen.append((tmp_path / "ck" / "checkpoint.json").read_text().count('"step": 2'))

    fit(tiny_source(), EfficientDM(**SETTINGS | {"steps": 4}), RunOptions(checkpoint=tmp_path / "ck", checkpoint_every=2), on_progress=look)
    assert seen == [1, 1]  # the callback of step 4 comes before its checkpoint


def test_two_runs_of_the_same_seed_are_the_same_and_of_another_are_not():
    def digest(seed):
        return fit(tiny_source(), EfficientDM(**SETTINGS | {"steps": 2, "seed": seed}), RunOptions()).digest

    assert digest(0) == digest(0) != digest(1)


def late_losses(recipe):
    """Sum of the losses of the last five training steps, in float32."""
    losses = []
    fit(tiny_source(), recipe, RunOptions(teacher_dtype="fp32"), on_progress=lambda progress: losses.append(progress.loss))
    return sum(losses[-5:])


def test_training_lowers_the_distance_to_the_teacher():
    settings = SETTINGS | {"rows": 2, "steps": 30, "batch": 16, "calibration_samples": 16, "rank": 8, "update_rate": 0.05}
    recipe = EfficientDM(**settings, weight_bits=2, act_bits=8, weight_scale_rate=1e-3, compute="fp32")
    # Untrained, because every rate is (nearly) 0. The teacher leads, so both runs have the same samples, and without a gradient the same losses.
    untrained = replace(recipe, update_rate=1e-30, weight_scale_rate=0.0, scale_rate=0.0, bound_rate=0.0)
    # The ratio is 0.70 here, exactly 1 without a gradient, and 8 with its sign reversed.
    assert late_losses(recipe) < 0.9 * late_losses(untrained)


def test_checkpoint_holds_every_row_of_every_table(tmp_path):
    recipe = EfficientDM(**SETTINGS | {"steps": 1})
    with_identity = fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck"))
    identity = {
        "recipe": "efficientdm",
        "settings": recipe.settings(),
        "teacher": with_identity.provenance["teacher_sha256"],
        "conditioning": with_identity.provenance["conditioning"],
        "teacher_dtype": "bf16",
        "kernels": with_identity.provenance["kernels"],
    }
    step, tensors = load_checkpoint(tmp_path / "ck", identity)
    assert step == 1
    tables = [value for name, value in tensors.items() if name.startswith("parameter.") and name.endswith("log_scale")]
    assert {tuple(table.shape) for table in tables} == {(4,)}
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_loss_that_is_not_finite_ends_the_training_before_a_checkpoint_of_it_is_written(tmp_path):
    recipe = EfficientDM(**SETTINGS | {"scale_rate": 1e30})
    with pytest.raises(InputError, match=r"the loss is nan after step 2 of 6, expected a finite number\. Set lower rates"):
        fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck"))
    assert not (tmp_path / "ck").exists()


def test_a_loss_that_rises_ends_in_one_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(divergence.log, "warning", lambda text, *values: warnings.append(text))
    fit(tiny_source(), EfficientDM(**SETTINGS | {"update_rate": 1e30}), RunOptions())
    assert [text.partition(":")[0] for text in warnings] == ["Training diverged"]

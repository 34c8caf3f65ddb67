import signal
from dataclasses import replace

import pytest
import torch

from calibration.observers.calibrate import calibrate
from calibration.recipes.minmax import MinMax
from calibration.recipes.mse import Mse
from calibration.recipes.static import Static
from calibration.run.options import Interrupted
from tests.calibration.tiny import tiny_context

BITS = {"weight_bits": 4, "act_bits": 4, "rows": 3}
SITE = "mid_block.resnets.0.conv1"


def test_every_row_spans_the_inputs_of_the_teacher_at_its_timestep():
    recipe = MinMax(**BITS)
    context = tiny_context(recipe)
    inputs = []
    handle = context.teacher.model.get_submodule(SITE).register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    calibrate(context, recipe)
    handle.remove()
    # Trajectories descend from noise, rows ascend with the timestep; a batch holds both samples.
    widths = torch.stack([x.max().clamp(min=0) - x.min().clamp(max=0) for x in reversed(inputs)])
    torch.testing.assert_close(context.student.layers[SITE].quantizer.log_scale.detach().exp(), widths / 15)


def test_a_static_recipe_sets_all_rows_to_one_range():
    recipe = Static(**BITS)
    context = tiny_context(recipe)
    calibrate(context, recipe)
    assert all(len(quantizer.log_scale.unique()) == 1 for quantizer in context.student.quantizers.values())


def test_the_pool_is_left_staggered():
    recipe = MinMax(**BITS)
    context = tiny_context(recipe, samples=6)
    calibrate(context, recipe)
    assert sorted(context.trajectories.position.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("corrects", [False, True])
def test_biases_are_corrected_only_if_the_recipe_does_so(corrects):
    recipe = Mse(**BITS, bias_correction=corrects)
    context = tiny_context(recipe)
    before = context.student.layers[SITE].layer.bias.clone()
    calibrate(context, recipe)
    assert torch.equal(context.student.layers[SITE].layer.bias, before) != corrects


def test_the_callback_runs_once_after_all_ranges_are_set():
    recipe, scales = MinMax(**BITS), []
    context = tiny_context(recipe)
    after = lambda: scales.append(context.student.layers[SITE].quantizer.log_scale.clone())  # noqa: E731
    calibrate(replace(context, run=replace(context.run, after_calibration=after)), recipe)
    (found,) = scales
    assert torch.equal(found, context.student.layers[SITE].quantizer.log_scale)
    assert bool((found != 0).all())


def test_ctrl_c_ends_the_calibration_and_removes_its_hooks():
    reports = []

    def interrupt(progress):
        reports.append((progress.stage, progress.step, progress.total, progress.loss))
        signal.raise_signal(signal.SIGINT)  # handled before it returns; os.kill may deliver it to another thread

    recipe = MinMax(**BITS)
    context = tiny_context(recipe, on_progress=interrupt)
    with pytest.raises(Interrupted, match="while calibrating; nothing was written"):
        calibrate(context, recipe)
    assert reports == [("calibrate", 1, 3, None)]
    assert not any(module._forward_pre_hooks for module in context.teacher.modules())

import torch

from calibration.observers.channel_scaling import ChannelRanges, channel_ranges, scalable, set_pre_scales, stacked_weight
from calibration.recipes.mse import Mse
from tests.calibration.tiny import tiny_context


def test_the_largest_magnitude_is_taken_over_both_ends_and_all_rows():
    ranges = ChannelRanges(torch.tensor([[-3.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 2.0], [2.0, 5.0]]))
    assert ranges.amax().tolist() == [3.0, 5.0]


def test_ranges_are_those_of_the_float_models_inputs_row_by_row():
    context = tiny_context(Mse(rows=3))
    name = next(name for name in scalable(context.student) if context.student.family.group(name) == "convolution")
    inputs = []
    handle = context.teacher.model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    ranges = channel_ranges(context, [name])[name]
    handle.remove()
    assert len(inputs) == len(ranges.high) == 3
    # The first input is the noisiest: the table's last row.
    assert torch.allclose(ranges.high[2], inputs[0].amax((0, 2, 3)).clamp(min=0))
    assert torch.allclose(ranges.low[0], inputs[2].amin((0, 2, 3)).clamp(max=0))
    assert context.trajectories.position.tolist() == [0, 0]


def test_pre_scales_apply_to_all_layers_with_the_same_input_and_preserve_the_function():
    student = tiny_context(Mse()).student
    name = next(name for name in scalable(student) if name.endswith("to_q"))
    siblings = student.shared_input_layers(name)
    assert len(siblings) == 3
    before = {sibling: student.layers[sibling].merged_weight().clone() for sibling in siblings}
    scale = torch.linspace(0.5, 2.0, before[name].shape[1])
    set_pre_scales(student, Mse(), {name: scale})
    for sibling in siblings:
        layer = student.layers[sibling]
        assert torch.allclose(layer.merged_weight() * layer.pre_scale, before[sibling], atol=1e-6)
    assert stacked_weight(student, name).shape == (sum(len(weight) for weight in before.values()), len(scale), 1)

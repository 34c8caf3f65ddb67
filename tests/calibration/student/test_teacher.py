import pytest
import torch

from calibration.recipes.mse import Mse
from calibration.student.teacher import Teacher, cast_inputs, restructured, share_weights
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite
from tests.calibration.student.test_student import CPU, TIMESTEPS
from tests.calibration.tiny import tiny_source
from tests.conftest import tiny_inputs


def addresses(model):
    return {value.data_ptr() for value in model.state_dict().values()}


def test_source_teacher_and_student_hold_one_copy_of_the_weights():
    source = tiny_source()
    source.model.to(memory_format=torch.channels_last)
    teacher = Teacher(source, CPU)
    student = Mse().student(source, TIMESTEPS, CPU, teacher=teacher)
    assert addresses(teacher.model) == addresses(source.model)
    assert {layer.layer.weight.data_ptr() for layer in student.layers.values()} <= addresses(source.model)


def test_a_student_shares_the_layout_that_its_teacher_had_to_copy():
    source = tiny_source()
    teacher = Teacher(source, CPU)
    assert addresses(teacher.model) != addresses(source.model)  # channels_last
    student = Mse().student(source, TIMESTEPS, CPU, teacher=teacher)
    assert {layer.layer.weight.data_ptr() for layer in student.layers.values()} <= addresses(teacher.model)


def test_a_parameter_replaced_in_one_model_stays_in_the_other():
    model = torch.nn.Linear(2, 2)
    shared = share_weights(model, CPU)
    assert shared.weight.data_ptr() == model.weight.data_ptr()
    shared.weight = torch.nn.Parameter(torch.zeros(2, 2))
    assert bool((model.weight != 0).any())


@pytest.mark.parametrize(("dtype", "weights"), [("bf16", torch.bfloat16), ("bf16-autocast", torch.float32)])
def test_a_bfloat16_teacher_predicts_in_float32_near_the_float32_one(dtype, weights):
    source, inputs = tiny_source(), tiny_inputs("unet2d")
    teacher = Teacher(source, CPU)
    expected = teacher(inputs)
    teacher.set_dtype(dtype)
    prediction = teacher(inputs)
    assert next(teacher.parameters()).dtype == weights
    assert prediction.dtype == torch.float32
    error = float((prediction - expected).square().mean() / expected.square().mean())
    assert 0 < error < 0.01  # 8 bits of mantissa in each of some thirty layers; a wrong timestep alone errs by more


def test_the_timestep_is_not_cast():
    inputs = {"sample": torch.zeros(1), "timestep": torch.tensor([999.0]), "class_labels": torch.tensor([3])}
    cast = cast_inputs(inputs, torch.bfloat16)
    assert {name: value.dtype for name, value in cast.items()} == {
        "sample": torch.bfloat16,
        "timestep": torch.float32,
        "class_labels": torch.int64,
    }


def test_a_restructured_source_computes_the_same_and_leaves_the_published_model():
    source, inputs = tiny_source(), tiny_inputs("unet2d")
    assert restructured(source, PUBLISHED) is source
    names = set(dict(source.model.named_modules()))
    split = restructured(source, NetworkRewrite({"up_blocks.0.resnets.1.conv_shortcut": (16, 8)}))
    assert set(dict(source.model.named_modules())) == names
    family = source.family_object
    # The sum over input channels is taken in two parts.
    torch.testing.assert_close(family.forward(split.model, inputs), family.forward(source.model, inputs), rtol=1e-4, atol=1e-5)

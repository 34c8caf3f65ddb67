import pytest
import torch

from calibration.recipes.mse import Mse
from calibration.student.teacher import Teacher
from calibration.student.to_artifact import artifact_from_student
from edm_deploy.artifact.reference import Reference
from tests.calibration.tiny import tiny_source
from tests.conftest import tiny_inputs

CPU = torch.device("cpu")
TIMESTEPS = torch.tensor([0, 500], dtype=torch.int32)


def student_of(kind="unet2d", **settings):
    source = tiny_source(kind)
    return source, Mse(**{"weight_bits": 4, "act_bits": 4} | settings).student(source, TIMESTEPS, CPU)


def test_projections_of_one_tensor_share_one_quantizer():
    _, student = student_of()
    query, key, value = (student.layers[f"mid_block.attentions.0.to_{letter}"].quantizer for letter in "qkv")
    assert query is key is value
    assert student.layers["mid_block.attentions.0.to_out.0"].quantizer is not query


def test_cross_attentions_keys_and_values_share_the_text_and_not_the_image():
    _, student = student_of("unet2d-condition")
    names = [name for name in student.layers if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(names) > 2
    assert len({id(student.layers[name].quantizer) for name in names}) == 1
    assert student.layers[names[0].replace("to_k", "to_q")].quantizer is not student.layers[names[0]].quantizer


def test_first_and_last_layers_stay_at_eight_bit():
    source, student = student_of()
    artifact = artifact_from_student(student, source, {})
    assert {artifact.sites[name].scheme for name in ("conv_in", "conv_out", "time_embedding.linear_1")} == {"W8A8"}
    assert artifact.scheme == "W4A4"


def test_sixteen_activation_bits_leave_every_input_alone():
    source, student = student_of(act_bits=16)
    assert student.quantizers == {}
    artifact = artifact_from_student(student, source, {})
    assert {site.scheme for site in artifact.sites.values()} == {"W4A16", "W8A16"}


def test_the_source_is_not_changed():
    source = tiny_source()
    before = source.digest()
    Mse(weight_bits=2, act_bits=3).student(source, TIMESTEPS, CPU)
    Teacher(source, CPU).set_dtype(torch.bfloat16)
    assert source.digest() == before


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


def test_a_corrected_bias_is_the_students_alone():
    source = tiny_source()
    teacher = Teacher(source, CPU)
    student = Mse(weight_bits=2).student(source, TIMESTEPS, CPU, teacher=teacher)
    before = source.digest()
    student.layers["conv_in"].correct_bias(torch.ones(3))
    assert source.digest() == before
    assert not torch.equal(student.layers["conv_in"].layer.bias, teacher.model.conv_in.bias)


@pytest.mark.parametrize("kind", ["unet2d", "unet2d-classes", "unet2d-condition"])
@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (2, 3), (4, 16)], ids=lambda bits: f"W{bits[0]}A{bits[1]}")
def test_each_site_of_the_reference_agrees_with_the_students_layer(kind, bits):
    source, student = student_of(kind, weight_bits=bits[0], act_bits=bits[1])
    for quantizer in student.quantizers.values():
        with torch.no_grad():
            quantizer.log_scale.copy_(torch.tensor([-1.0, -1.3]) if quantizer.bits < 8 else torch.tensor([-3.0, -3.2]))
            if quantizer.qmin.requires_grad:
                quantizer.qmin.copy_(-torch.tensor([2.0, 3.0]))
    inputs = tiny_inputs(kind)
    records = Reference(artifact_from_student(student, source, {})).record(inputs)
    assert set(records) == set(student.layers)
    rows = torch.tensor([0, 1, 1])  # of timesteps 0, 500 and 999
    with torch.no_grad():
        for name, record in records.items():
            layer = student.layers[name]
            if layer.quantizer:
                layer.quantizer.current = rows
                layer.quantizer.forget()
            # The same codes and scales; only the order of float32 sums differs.
            torch.testing.assert_close(layer(record.x), record.y, rtol=1e-4, atol=1e-4)


def test_the_whole_prediction_is_the_references_up_to_rounding_ties():
    source, student = student_of(weight_bits=8, act_bits=8)
    for quantizer in student.quantizers.values():
        torch.nn.init.constant_(quantizer.log_scale, -3.5)
    inputs = tiny_inputs("unet2d")
    with torch.no_grad():
        ours = student(inputs)
    theirs = Reference(artifact_from_student(student, source, {}))(inputs)
    exact = source.family_object.forward(source.model, inputs)
    assert float((ours - theirs).square().mean()) <= float((exact - theirs).square().mean())

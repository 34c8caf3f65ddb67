import torch

from calibration.recipes.mse import Mse
from calibration.student.student import activations_unquantized
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


def test_the_source_is_not_changed():
    source = tiny_source()
    before = source.digest()
    Mse(weight_bits=2, act_bits=3).student(source, TIMESTEPS, CPU)
    Teacher(source, CPU).set_dtype("bf16")
    assert source.digest() == before


def test_a_corrected_bias_is_the_students_alone():
    source = tiny_source()
    teacher = Teacher(source, CPU)
    student = Mse(weight_bits=2).student(source, TIMESTEPS, CPU, teacher=teacher)
    before = source.digest()
    student.layers["conv_in"].correct_bias(torch.ones(3))
    assert source.digest() == before
    assert not torch.equal(student.layers["conv_in"].layer.bias, teacher.model.conv_in.bias)


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


def test_activations_are_quantized_again_after_the_context():
    _, student = student_of()
    before = {name: layer.quantizer for name, layer in student.layers.items()}
    with activations_unquantized(student):
        assert all(layer.quantizer is None for layer in student.layers.values())
    assert all(layer.quantizer is before[name] for name, layer in student.layers.items())

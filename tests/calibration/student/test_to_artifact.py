import pytest
import torch

from calibration.student.to_artifact import artifact_from_student
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import ArtifactError
from tests.calibration.student.test_student import student_of
from tests.conftest import tiny_inputs


def test_first_and_last_layers_stay_at_eight_bit():
    source, student = student_of()
    artifact = artifact_from_student(student, source, {})
    assert {artifact.sites[name].scheme for name in ("conv_in", "conv_out", "time_embedding.linear_1")} == {"W8A8"}
    assert artifact.scheme == "W4A4"


def test_sixteen_activation_bits_leave_every_input_in_floating_point():
    source, student = student_of(act_bits=16)
    assert student.quantizers == {}
    artifact = artifact_from_student(student, source, {})
    assert {site.scheme for site in artifact.sites.values()} == {"W4A16", "W8A16"}


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
                layer.quantizer.rows = rows
                layer.quantizer.clear_cache()
            # The same codes and scales; only the order of float32 sums differs.
            torch.testing.assert_close(layer(record.x), record.y, rtol=1e-4, atol=1e-4)


def test_a_scale_that_training_made_infinite_is_refused():
    source, student = student_of()
    torch.nn.init.constant_(student.layers["conv_in"].log_weight_scale, torch.inf)
    with pytest.raises(ArtifactError, match="conv_in"):
        artifact_from_student(student, source, {})


def test_the_artifact_has_the_students_tables_and_the_sources_other_parameters():
    source, student = student_of()
    artifact = artifact_from_student(student, source, {"recipe": "by hand"})
    assert artifact.timesteps.tolist() == [0, 500]
    assert artifact.provenance == {"recipe": "by hand"}
    assert not any(f"{name}.weight" in artifact.params for name in artifact.sites)
    assert set(artifact.params) | {f"{name}.weight" for name in artifact.sites} == set(source.model.state_dict())

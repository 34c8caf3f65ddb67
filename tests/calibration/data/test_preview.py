import torch

from calibration.data import preview
from calibration.data.preview import COUNT, Preview
from calibration.student.teacher import Teacher
from edm_deploy.pipelines.guidance import Conditioner
from tests.calibration.tiny import CPU, tiny_source


def test_samples_of_a_network_are_the_same_each_time_and_differ_by_the_network(monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 3)
    source = tiny_source("unet2d-condition")
    conditioner = Conditioner(source.family_object, source.config, scale=2.0)
    drawn, teacher = Preview(source, conditioner, device=CPU, seed=1), Teacher(source, CPU)
    first = drawn.sample(teacher)
    assert first.shape == (COUNT, 4, 8, 8)
    assert torch.equal(Preview(source, conditioner, device=CPU, seed=1).sample(teacher), first)
    assert not torch.equal(drawn.sample(lambda inputs: 0.5 * teacher(inputs)), first)

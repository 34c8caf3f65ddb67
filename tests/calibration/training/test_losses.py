import math

import pytest
import torch

from calibration.training.losses import LayerOutputLoss, RelationDistillationLoss, log_relations, pixels_of


def test_layer_output_errors_are_relative_to_each_layers_output():
    teacher = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([10.0, -10.0])}
    student = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([10.0, -20.0])}
    # a: mean(1, 0) / 4 = 0.125; b: mean(0, 100) / 100 = 0.5.
    assert float(LayerOutputLoss(("a", "b"), weight=2.0)(student, teacher)) == pytest.approx(2 * 0.625)


def test_orthogonal_pixels_have_similarity_zero_and_each_with_itself_one():
    shares = log_relations(torch.tensor([[[3.0, 0.0], [0.0, 5.0]]])).exp()[0]
    alike = math.e / (math.e + 1)
    assert torch.allclose(shares, torch.tensor([[alike, 1 - alike], [1 - alike, alike]]))


def test_relations_are_invariant_to_the_scale_of_the_map_only():
    features = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    term = RelationDistillationLoss("m", weight=100.0)
    assert float(term({"m": 2 * features}, {"m": features})) == pytest.approx(0, abs=1e-3)
    assert float(term({"m": features.flip(1) + 1}, {"m": features})) > 1


def test_the_divergence_is_that_of_the_student_from_the_teacher():
    student, teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    shares = log_relations(teacher).exp()
    expected = (shares * (log_relations(teacher) - log_relations(student))).sum()  # over both pixels
    term = RelationDistillationLoss("m", weight=1.0)
    assert float(term({"m": student}, {"m": teacher})) == pytest.approx(float(expected))
    twice = {"m": student.repeat(3, 1, 1)}, {"m": teacher.repeat(3, 1, 1)}
    assert float(term(*twice)) == pytest.approx(float(expected))  # a mean over the samples


def test_relations_have_a_gradient_through_the_student():
    # The released code has none: both of its maps are detached.
    features = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    student = (features + 0.1).requires_grad_(True)
    RelationDistillationLoss("m", weight=1.0)({"m": student}, {"m": features}).backward()
    assert float(student.grad.abs().sum()) > 0


@pytest.mark.parametrize(("shape", "pixels"), [((2, 5, 32, 32), 256), ((2, 5, 4, 3), 12), ((2, 1000, 5), 256), ((2, 7, 5), 7)])
def test_large_maps_and_long_sequences_are_average_pooled(shape, pixels):
    assert pixels_of(torch.ones(shape), 256).shape == (2, pixels, 5)

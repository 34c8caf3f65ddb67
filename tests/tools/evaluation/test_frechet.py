import math

import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy_tools.evaluation.frechet import frechet_distance, moments, symmetric_root


def normal(count, size, *, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaped(features, mean, root):
    """The same number of vectors with exactly this mean and the covariance root @ root.T."""
    centred = features - features.mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(moments(centred)[1])).T
    return whitened @ root.T + mean


def test_a_set_is_at_distance_0_from_itself():
    features = normal(50, 8)
    assert frechet_distance(features, features.clone()) == pytest.approx(0, abs=1e-9)


def test_fewer_samples_than_features_are_no_trouble():
    features = normal(5, 40)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)  # roots of eigenvalues that are 0 but for rounding
    assert frechet_distance(features, features + 1) == pytest.approx(40, rel=1e-6)


def test_one_dimension_by_hand():
    # Means 0 and 3, standard deviations sqrt(2) and sqrt(8): 9 + 2 + 8 - 2 sqrt(16) = 11.
    assert frechet_distance(torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])) == pytest.approx(11)


def test_gaussians_that_commute_have_a_closed_form():
    one = shaped(normal(100, 3), torch.zeros(3), torch.diag(torch.tensor([1.0, 2.0, 3.0])).double())
    other = shaped(normal(100, 3, seed=1), torch.ones(3), torch.diag(torch.tensor([2.0, 2.0, 1.0])).double())
    assert frechet_distance(one, other) == pytest.approx(3 + 1 + 0 + 4)


def test_gaussians_that_do_not_commute_have_a_closed_form_in_two_dimensions():
    a, b = torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double(), torch.tensor([[1.0, 0.0], [-2.0, 3.0]]).double()
    one, other = shaped(normal(60, 2), torch.zeros(2), a), shaped(normal(60, 2, seed=1), torch.zeros(2), b)
    c1, c2 = a @ a.T, b @ b.T
    # The trace of the root of a 2 x 2 matrix is sqrt(trace + 2 sqrt(determinant)).
    root = math.sqrt(float((c1 @ c2).trace()) + 2 * math.sqrt(float(torch.det(c1 @ c2))))
    assert frechet_distance(one, other) == pytest.approx(float(c1.trace() + c2.trace()) - 2 * root)


def test_it_is_symmetric_and_blind_to_rotations():
    one, other = normal(30, 4), 2 * normal(40, 4, seed=1) + 1
    rotation = torch.linalg.qr(normal(4, 4, seed=2)).Q
    distance = frechet_distance(one, other)
    assert frechet_distance(other, one) == pytest.approx(distance)
    assert frechet_distance(one @ rotation, other @ rotation) == pytest.approx(distance)


def test_two_samples_of_one_distribution_come_nearer_with_n():
    far, near = (frechet_distance(normal(n, 16), normal(n, 16, seed=1)) for n in (64, 1024))
    assert near < far / 4 < far


def test_a_root_squared_is_the_matrix():
    matrix = normal(6, 6) @ normal(6, 6).T
    assert torch.allclose(symmetric_root(matrix) @ symmetric_root(matrix), matrix)


def test_one_sample_is_refused():
    with pytest.raises(InputError, match="at least 2 samples of each model, 1 given"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2))

import itertools

import pytest
import torch

from calibration.observers.kmeans import centroids_of, cluster, memberships, segment

POINTS = torch.tensor([[0.0], [1.0], [10.0], [11.0], [0.5]])


def scatter(points, groups):
    return float((points - centroids_of(points, groups)[groups]).square().sum())


def test_segments_end_where_the_points_jump():
    assert segment(POINTS, 3).tolist() == [0, 0, 1, 1, 2]
    assert segment(POINTS, 1).tolist() == [0] * 5
    assert segment(POINTS, 9).tolist() == [0, 1, 2, 3, 4]


def test_clusters_need_not_be_contiguous():
    assert cluster(POINTS, 2).tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_other_segments_are_closer_to_their_means(count):
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    found = scatter(points, segment(points, count))
    for cuts in itertools.combinations(range(1, 8), count - 1):
        other = (torch.arange(8)[:, None] >= torch.tensor(cuts)).sum(1)
        assert found <= scatter(points, other) + 1e-4


def test_clusters_are_no_further_from_their_means_than_segments():
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(2))
    groups = cluster(points, 4)
    assert scatter(points, groups) <= scatter(points, segment(points, 4)) + 1e-5
    first = [groups.tolist().index(group) for group in range(int(groups.max()) + 1)]
    assert first == sorted(first)


def test_equal_points_form_one_cluster():
    assert cluster(torch.zeros(4, 2), 3).max() == 0


def test_a_point_between_two_clusters_belongs_to_both():
    points, groups = torch.tensor([[0.0], [2.0], [4.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    shares = memberships(points, groups)  # means 1 and 3
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert shares[1].tolist() == [0.5, 0.5]
    assert shares[0, 0] > 0.9

import torch

from calibration.observers.low_rank import low_rank, rough_low_rank


def test_the_low_rank_part_is_that_of_the_singular_value_decomposition():
    for shape in ((12, 40), (40, 12)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        down, up = low_rank(weight, 5)
        assert down.shape == (5, shape[1]) and up.shape == (shape[0], 5)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(up @ down, left[:, :5] * values[:5] @ right[:5], rtol=1e-4, atol=1e-4)
        rough = rough_low_rank(weight, 5, torch.Generator().manual_seed(0))
        assert float((rough - weight).norm()) < 1.05 * float((up @ down - weight).norm())
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_a_weight_of_a_lower_rank_leaves_nothing():
    weight = torch.ones(4, 6)
    down, up = low_rank(weight, 3)
    torch.testing.assert_close(up @ down, weight, rtol=1e-5, atol=1e-5)
    assert bool(down.isfinite().all())

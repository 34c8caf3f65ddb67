import numpy as np
import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy.numerics.seeds import LARGEST_SEED, check_seed, derived_seed


@pytest.mark.parametrize("seed", [-1, 2**63, 12345678901234567890, 0.5, "0", None])
def test_what_is_no_seed_is_refused_with_the_range(seed):
    with pytest.raises(InputError, match=r"seed is .*; expected an integer from 0 to 9223372036854775807\. Set another seed"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, LARGEST_SEED, np.int64(7)])
def test_seeds_of_the_range_are_taken_by_torch_with_all_that_is_derived_from_them(seed):
    check_seed(seed)
    for derived in (int(seed), int(seed) + 1, derived_seed(int(seed), 0), derived_seed(int(seed), 1000)):
        torch.Generator().manual_seed(derived)


def test_derived_seeds_are_those_that_small_seeds_always_had():
    assert [derived_seed(0, 5), derived_seed(2, 3)] == [5, 2 * 1_000_003 + 3]

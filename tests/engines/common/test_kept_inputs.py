import torch

from engines.common.kept_inputs import KeptInputs


def test_a_copy_stays_where_it_is_and_follows_the_tensor_of_the_last_call():
    kept, first = KeptInputs({"weight"}), torch.ones(2)
    kept.renew({"weight": first, "x": torch.zeros(1)})
    copy = kept.get("weight")
    first += 1  # the same tensor is taken to be unchanged, as Session.run's contract has it
    kept.renew({"weight": first})
    assert copy.tolist() == [1, 1]
    kept.renew({"weight": torch.full((2,), 5.0)})
    assert kept.get("weight") is copy
    assert copy.tolist() == [5, 5]


def test_other_inputs_are_not_kept_and_cleared_ones_are_gone():
    kept = KeptInputs({"weight"})
    kept.renew({"weight": torch.ones(2), "x": torch.zeros(1)})
    assert kept.get("x") is None
    kept.clear()
    assert kept.get("weight") is None

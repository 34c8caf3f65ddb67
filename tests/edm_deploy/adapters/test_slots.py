import pytest
import torch

from edm_deploy.adapters.lora import LayerUpdate
from edm_deploy.adapters.slots import LoadedAdapter, SlotState, packed
from edm_deploy.errors import InputError
from edm_deploy.network.adapter_inputs import AdapterInputs

DECLARED = AdapterInputs(3, {"a": (2, 4), "b": (2, 1, 3, 3)})
CPU = torch.device("cpu")


def loaded(name, rank, weight=1.0, sites=("a",)):
    updates = {site: LayerUpdate(torch.full((rank, *DECLARED.layers[site][1:]), 1.0 + rank), torch.ones(2, rank)) for site in sites}
    return LoadedAdapter(name, rank, updates, torch.tensor(weight).reshape(-1))


def test_adapters_lie_next_to_each_other_and_free_slots_are_zero():
    weights = packed([loaded("x", 1), loaded("y", 1, sites=("a", "b"))], DECLARED, torch.float32, CPU)
    assert weights["lora.a.down"].tolist() == [[2] * 4, [2] * 4, [0] * 4]
    assert weights["lora.a.up"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert weights["lora.b.down"].shape == (3, 1, 3, 3) and weights["lora.b.up"].shape == (2, 3, 1, 1)
    assert weights["lora.b.up"][:, :, 0, 0].tolist() == [[0, 1, 0], [0, 1, 0]]  # the slots are the same at every site


def test_each_sample_has_its_own_weights_and_halves_of_guidance_repeat_them():
    state = SlotState((loaded("x", 1, 0.5), loaded("y", 2, [1.0, 0.0])), {})
    assert state.scales(2, 4).tolist() == [[0.5, 1, 1, 0], [0.5, 0, 0, 0]]
    assert state.scales(4, 4)[2:].tolist() == state.scales(2, 4).tolist()
    with pytest.raises(InputError, match="Adapter 'y' has weights for 2 samples, the batch has 3"):
        state.scales(3, 4)
    assert not SlotState(state.adapters, {}, enabled=False).scales(2, 4).any()
    assert state.weighted({"x": torch.tensor([2.0])}).scales(2, 4)[0].tolist() == [2, 0, 0, 0]


def test_too_many_ranks_together_are_refused_and_so_is_what_float16_cannot_hold():
    with pytest.raises(
        InputError, match=r"ranks 2 \+ 2 = 4 together; this engine has 3 rank slots\. Unload one, or export again with --lora-rank 4"
    ):
        packed([loaded("x", 2), loaded("y", 2)], DECLARED, torch.float32, CPU)
    large = LoadedAdapter("x", 1, {"a": LayerUpdate(torch.full((1, 4), 1e5), torch.ones(2, 1))}, torch.ones(1))
    with pytest.raises(InputError, match=r"A weight of site 'a' is above 65504, the largest torch\.float16\. Export with --dtype fp32"):
        packed([large], DECLARED, torch.float16, CPU)


def test_an_unknown_name_is_refused_with_those_that_are_loaded():
    with pytest.raises(InputError, match="No adapter 'z' is loaded; loaded are x"):
        SlotState((loaded("x", 1),), {}).named("z")

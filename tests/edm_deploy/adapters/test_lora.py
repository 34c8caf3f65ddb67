import pytest
import torch

from edm_deploy.adapters.lora import LayerUpdate, Lora, check_lora
from edm_deploy.errors import InputError


def test_an_update_is_the_product_of_its_matrices_in_the_shape_of_the_weight():
    update = LayerUpdate(torch.arange(6.0).reshape(1, 2, 1, 3), torch.tensor([[1.0], [2.0]]))
    assert update.delta().tolist() == [[[[0, 1, 2]], [[3, 4, 5]]], [[[0, 2, 4]], [[6, 8, 10]]]]
    assert update.rank == 1


def test_the_rank_of_a_lora_is_the_largest_of_its_layers():
    layers = {name: LayerUpdate(torch.zeros(rank, 4), torch.zeros(4, rank)) for name, rank in (("a", 2), ("b", 5))}
    assert Lora("x", layers).rank == 5
    check_lora(Lora("x", layers), {"a": (4, 4), "b": (4, 4)})


def test_a_lora_of_another_base_of_nan_or_of_nothing_is_refused():
    update = LayerUpdate(torch.zeros(2, 4), torch.zeros(3, 2))
    with pytest.raises(
        InputError, match=r"^x is for another base model: layer 'a' has shape \[3, 8\], the LoRA's update of it \[3, 4\]\. Choose"
    ):
        check_lora(Lora("x", {"a": update}), {"a": (3, 8)})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^x: layer 'a' holds NaN or infinity"):
            check_lora(Lora("x", {"a": LayerUpdate(torch.full((2, 4), bad), update.up)}), {"a": (3, 4)})
    with pytest.raises(InputError, match=r"^x holds no LoRA of the denoiser"):
        check_lora(Lora("x", {}), {})

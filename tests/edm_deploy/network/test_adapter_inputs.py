import pytest
import torch
from torch import nn
from torch.nn import functional

from edm_deploy.errors import InputError
from edm_deploy.network.adapter_inputs import AdapterInputs, adapter_inputs, branch
from tests.conftest import tiny_model

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4), rand(2, 6)),
        (nn.Linear(6, 4), rand(2, 5, 6)),
        (nn.Linear(6, 4), rand(2, 3, 5, 6)),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), rand(2, 6, 8, 8)),
        (nn.Conv2d(6, 4, 1), rand(2, 6, 3, 3)),
    ],
    ids=["vector", "tokens", "map of tokens", "3x3", "1x1"],
)
def test_a_branch_is_the_layer_of_its_update_times_each_samples_weight(layer, x):
    down, up, scale = rand(3, *layer.weight.shape[1:]), rand(4, 3, *[1] * (layer.weight.ndim - 2)), rand(2, 3)
    found = branch(layer, x, down, up, scale)
    for sample in range(2):
        weight = torch.einsum("or,r,r...->o...", up.flatten(1), scale[sample], down)
        one = x[sample : sample + 1]
        linear = isinstance(layer, nn.Linear)
        expected = functional.linear(one, weight) if linear else functional.conv2d(one, weight, None, layer.stride, layer.padding)
        torch.testing.assert_close(found[sample : sample + 1], expected, atol=1e-4, rtol=0)


def test_the_inputs_have_the_shapes_that_the_weights_decide():
    adapters = AdapterInputs(2, {"a": (4, 6), "b": (4, 3, 3, 3)})
    assert [(declared.name, declared.dims) for declared in adapters.inputs] == [
        ("lora.scale", ("batch", 2)),
        ("lora.a.down", (2, 6)),
        ("lora.a.up", (4, 2)),
        ("lora.b.down", (2, 3, 3, 3)),
        ("lora.b.up", (4, 2, 1, 1)),
    ]
    zeros = adapters.zeros(torch.float16, torch.device("cpu"))
    assert {name: tuple(value.shape) for name, value in zeros.items()} == {each.name: each.dims for each in adapters.weights}
    assert len({value.untyped_storage().data_ptr() for value in zeros.values()}) == 1


def test_by_default_attention_and_transformer_blocks_have_a_branch_and_nothing_else():
    family, _, model = tiny_model("unet2d-condition")
    sites = list(family.sites(model))
    found = adapter_inputs(family, model, sites, rank=2).layers
    assert found and set(found) == {name for name in sites if ".attentions." in name}
    assert set(adapter_inputs(family, model, sites, rank=2, pattern=".").layers) == set(sites)
    for rank, pattern, message in (
        (0, None, "--lora-rank 0: expected 1 to 1024"),
        (2000, None, "--lora-rank 2000"),
        (2, "(", r"--lora-layers '\(' is no regular expression"),
        (2, "nothing", "--lora-layers 'nothing' matches none of the quantized layers, such as conv_in"),
    ):
        with pytest.raises(InputError, match=message):
            adapter_inputs(family, model, sites, rank=rank, pattern=pattern)

import copy

import pytest
import torch
from torch import nn

from edm_deploy.errors import ArtifactError
from edm_deploy.models import family_named
from edm_deploy.network.meta_model import meta_model
from edm_deploy.network.restructure import (
    PUBLISHED,
    NetworkRewrite,
    SplitInputLayer,
    layer_of,
    published_weight,
    representable,
    restructure,
    site_input,
    site_weight,
    weight_to_hold,
)
from edm_deploy.network.rotation import rotate
from tests.conftest import tiny_inputs, tiny_model


def block():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"conv": nn.Conv2d(5, 4, 3, stride=2, padding=1), "linear": nn.Linear(6, 3), "grouped": nn.Conv2d(4, 4, 3, groups=2)}
    )


@pytest.mark.parametrize(("name", "sizes", "shape"), [("conv", (2, 3), (2, 5, 8, 8)), ("linear", (1, 2, 3), (2, 7, 6))])
def test_a_segmented_layer_computes_what_the_whole_one_does(name, sizes, shape):
    model = block()
    whole, x = model[name], torch.randn(shape)
    expected = whole(x)
    restructure(model, NetworkRewrite({name: sizes}))
    assert isinstance(model[name], SplitInputLayer)
    assert [part.weight.shape[1] for part in model[name].children()] == list(sizes)
    assert [part.bias is not None for part in model[name].children()] == [True] + [False] * (len(sizes) - 1)
    torch.testing.assert_close(model[name](x), expected)


@pytest.mark.parametrize(("name", "shape"), [("conv", (2, 5, 8, 8)), ("linear", (2, 7, 6))])
def test_a_pre_scaled_layer_with_its_weight_divided_computes_the_same(name, shape):
    model = block()
    x = torch.randn(shape)
    expected = model[name](x)
    restructure(model, NetworkRewrite(pre_scaled=(name,)))
    layer = model[name]
    torch.testing.assert_close(layer(x), expected, msg="it starts at 1")
    scale = representable(torch.linspace(0.3, 2, layer.weight.shape[1]))
    layer.pre_scale.data.copy_(scale)
    layer.weight.data.div_(scale.reshape(-1, *[1] * (layer.weight.ndim - 2)))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(site_input(layer, x), x * (scale[:, None, None] if name == "conv" else scale))


def test_a_rotated_layer_computes_the_same_and_pre_scales_come_first():
    model = block()
    x = torch.randn(2, 7, 6)
    expected = model["linear"](x)
    restructure(model, NetworkRewrite(pre_scaled=("linear",), rotated={"linear": 2}))
    layer = model["linear"]
    torch.testing.assert_close(layer(x), expected)
    scale = representable(torch.linspace(0.3, 2, 6))
    layer.pre_scale.data.copy_(scale)
    torch.testing.assert_close(site_input(layer, x), rotate(x * scale, 2))
    held = layer.weight.detach().clone()
    layer.weight.data.copy_(site_weight(layer, held))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(weight_to_hold(layer, layer.weight), held)
    torch.testing.assert_close(published_weight(layer, held), block()["linear"].weight)


def test_a_copy_of_a_pre_scaled_layer_is_pre_scaled():
    model = block()
    restructure(model, NetworkRewrite(pre_scaled=("linear",)))
    model["linear"].pre_scale.data.fill_(2)
    copied, x = copy.deepcopy(model), torch.randn(1, 6)
    torch.testing.assert_close(copied["linear"](x), model["linear"](x))


def test_the_parts_of_a_layer_share_its_fate():
    assert layer_of("up.0.conv_shortcut.segment1") == "up.0.conv_shortcut"
    assert layer_of("up.0.to_out.0") == "up.0.to_out.0"
    family = family_named("unet2d")
    assert family.rule("conv_out.segment0") == family.rule("conv_out")
    assert family.group("up.conv_shortcut.segment1") == "skip"


def test_a_skeleton_is_restructured_and_a_model_s_function_is_not():
    family, config, model = tiny_model("unet2d")
    shortcut = "up_blocks.0.resnets.0.conv_shortcut"
    channels = model.get_submodule(shortcut).in_channels
    structure = NetworkRewrite({shortcut: (channels - 8, 8)}, pre_scaled=("conv_in", f"{shortcut}.segment1"))
    outline = meta_model(family, config, structure)
    assert {f"{shortcut}.segment0", f"{shortcut}.segment1", "conv_in"} <= set(family.sites(outline))
    assert shortcut not in family.sites(outline)
    inputs = tiny_inputs("unet2d")
    expected = family.forward(model, inputs)
    restructure(model, structure)
    assert {name: value.shape for name, value in model.state_dict().items()} == {k: v.shape for k, v in outline.state_dict().items()}
    torch.testing.assert_close(family.forward(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_json_gives_back_what_was_written():
    structure = NetworkRewrite({"a": (1, 2)}, ("b", "a.segment0"), rotated={"b": 64})
    assert NetworkRewrite.from_json(structure.to_json()) == structure
    assert PUBLISHED.to_json() == {} and not PUBLISHED and structure


def test_pre_scales_are_what_float16_holds():
    found = representable(torch.tensor([1.0, 1e-9, 1e9, 0.1]))
    assert torch.equal(found, found.half().float()) and bool((found > 0).all()) and bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (
            NetworkRewrite({"conv": (2, 2)}),
            r"'conv' cannot be split into segments \[2, 2\]: it has 5 input channels, expected two or more parts",
        ),
        (NetworkRewrite({"conv": (5,)}), "expected two or more parts"),
        (NetworkRewrite({"grouped": (1, 1)}), "it is a grouped convolution"),
        (NetworkRewrite({"nothing": (1, 1)}), "'nothing' is not a convolution or linear layer of this model"),
        (NetworkRewrite(pre_scaled=("grouped",)), "'grouped' is a grouped convolution; its input cannot be scaled"),
        (NetworkRewrite(pre_scaled=("conv", "conv")), "'conv' is listed twice"),
        (NetworkRewrite(pre_scaled=("",)), "is not a convolution or linear layer"),
        (
            NetworkRewrite(rotated={"nothing": 2}),
            "'nothing' is not a convolution or linear layer of this model, .* split, scaled, rotated or have a branch",
        ),
        (NetworkRewrite(rotated={"conv": 2}), "'conv': its input cannot be rotated in blocks of 2: it is a convolution, expected a linear"),
        (NetworkRewrite(rotated={"linear": 3}), "in blocks of 3: expected a power of two, 2 to 1024"),
        (NetworkRewrite(rotated={"linear": 1 << 20}), "expected a power of two, 2 to 1024"),
        (NetworkRewrite(rotated={"linear": 4}), "it has 6 input channels, expected a size that divides them, such as 2"),
    ],
)
def test_what_the_model_cannot_be_is_refused(structure, message):
    with pytest.raises(ArtifactError, match=message):
        restructure(block(), structure)


def test_a_summary_names_the_first_three():
    cut = dict.fromkeys("abcd", (2, 3))
    assert NetworkRewrite(cut).summary() == "4 layers split: a into 2 + 3 channels, b into 2 + 3 channels, c into 2 + 3 channels, ..."
    assert NetworkRewrite({}, ("q", "k")).summary() == "2 inputs scaled by channel: q, k"
    assert NetworkRewrite(rotated={"q": 64}).summary() == "1 inputs rotated: q in blocks of 64"
    assert PUBLISHED.summary() == "as published"


def test_the_parts_of_a_layer_with_float16_weights_compute_in_float32():
    """As --low-memory leaves the weights in the type of their files."""
    layer = torch.nn.Conv2d(4, 2, 1).half()
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(SplitInputLayer(layer, [2, 2])(x), layer.float()(x))

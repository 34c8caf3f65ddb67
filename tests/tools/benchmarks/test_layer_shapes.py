"""The table of layers against the models that have them."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.family import SAMPLE
from edm_deploy.network.meta_model import meta_model
from edm_deploy_tools.benchmarks.layer_shapes import BATCHES, LAYERS, Layer
from edm_deploy_tools.common.assets import REFERENCE_MODEL
from edm_deploy_tools.inspection.architectures import architecture

REFERENCE = REFERENCE_MODEL / "unet" / "config.json"


def layers_of(name: str) -> Counter[Layer]:
    """Every layer of a model for one sample, `uses` left at 1; the model has no weights and computes nothing."""
    config = json.loads(REFERENCE.read_text()) if name == "reference" else dict(architecture(name).config)
    family = family_named("unet2d" if name == "reference" else name_of_family(architecture(name).class_name))
    model, found = meta_model(family, config), Counter()

    def look(layer: nn.Module, args: tuple, _: torch.Tensor) -> None:
        x = args[0]
        if isinstance(layer, nn.Conv2d):
            assert layer.padding[0] == layer.kernel_size[0] // 2
            _, C, H, W = x.shape
            found[Layer("conv", C, layer.out_channels, H, W, layer.kernel_size[0], layer.stride[0], 1)] += 1
        else:
            found[Layer("linear", x.shape[-1], layer.out_features, x.numel() // x.shape[-1], 1, 1, 1, 1)] += 1

    for layer in family.sites(model).values():
        layer.register_forward_hook(look)
    conditioning = family.random_conditioning(config, 1, torch.Generator().manual_seed(0))
    inputs = {SAMPLE: torch.empty(1, *family.sample_shape(config)), "timestep": torch.zeros(1)} | conditioning
    with torch.no_grad():
        family.forward(model, {key: value.to("meta") for key, value in inputs.items()})
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_has_each_layer_as_often_as_its_table_states(name):
    found = layers_of(name)
    table = {Layer(*list(vars(layer).values())[:-1], 1): layer.uses for layer in LAYERS[name]}
    assert table == {layer: found[layer] for layer in table}
    whole = sum(layer.macs * uses for layer, uses in found.items())
    assert sum(layer.macs * uses for layer, uses in table.items()) > 0.9 * whole


def test_every_model_has_its_batches():
    assert set(BATCHES) == set(LAYERS)


def test_a_layer_is_printed_with_its_shape():
    down = Layer("conv", 3, 8, 9, 8, 3, 2, 1)
    assert (down.P, down.Q, down.macs) == (5, 4, 3 * 8 * 9 * 20)
    assert str(down) == "conv 3x3 3->8, 9x8 stride 2"
    assert str(Layer("linear", 320, 640, 77, 1, 1, 1, 1)) == "linear 320->640, 77 tokens"

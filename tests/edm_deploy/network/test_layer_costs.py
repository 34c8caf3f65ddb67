from __future__ import annotations

import pytest
import torch

from edm_deploy.models import family_named
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.restructure import NetworkRewrite
from tests.conftest import TINY_CONDITION_UNET, TINY_UNET


@pytest.fixture(scope="module")
def work():
    return model_work(family_named("unet2d"), TINY_UNET)


def test_a_convolution_s_work_is_weights_times_positions(work):
    conv_in = work.sites["conv_in"]
    assert (conv_in.channels, conv_in.taps, conv_in.outputs) == (3, 9, 8)
    assert conv_in.macs == 8 * 3 * 3 * 3 * 8 * 8
    assert work.sites["time_embedding.linear_1"].macs == 8 * 32


def test_a_convolution_of_stride_2_reads_four_times_what_it_writes(work):
    name = next(name for name in work.sites if "downsamplers" in name)
    assert work.sites[name].inputs_at == 4 * work.sites[name].outputs_at


def test_every_site_and_every_parameter_is_counted(work):
    family = family_named("unet2d")
    with torch.device("meta"):
        model = family.build(TINY_UNET)
    assert list(work.sites) == list(family.sites(model))
    assert work.parameters == sum(value.numel() for value in model.parameters())


def test_attention_s_matmuls_are_counted_outside_the_sites():
    """Two matmuls of [tokens, tokens, width] in each attention block; torch counts them on its own."""
    config = TINY_UNET | {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    family = family_named("unet2d")
    with torch.device("meta"):
        blocks = sum(type(module).__name__ == "Attention" for module in family.build(config).modules())
    tokens, width = 4 * 4, config["block_out_channels"][-1]
    found = model_work(family, config)
    assert found.other_macs == blocks * 2 * tokens * tokens * width
    assert found.macs == sum(site.macs for site in found.sites.values()) + found.other_macs


def test_projections_of_one_tensor_share_their_input(work):
    attention = [name for name in work.sites if name.endswith((".to_q", ".to_k", ".to_v"))]
    assert {work.shared_input[name].rsplit(".", 1)[-1] for name in attention} == {"to_q"}
    assert work.shared_input["conv_in"] == "conv_in"
    assert set(work.shared_input) == set(work.sites)


def test_the_parts_of_a_split_layer_cost_as_much_as_the_layer_and_pre_scales_nothing(work):
    layer, query = "up_blocks.0.resnets.0.conv_shortcut", "up_blocks.0.attentions.0.to_q"
    found = model_work(family_named("unet2d"), TINY_UNET, NetworkRewrite({layer: (20, 12)}, (query, query.replace("to_q", "to_k"))))
    assert [found.sites[f"{layer}.segment{index}"].channels for index in (0, 1)] == [20, 12]
    assert layer not in found.sites
    assert found.macs == work.macs
    assert found.shared_input[query.replace("to_q", "to_k")] == query


def test_activation_memory_is_the_peak_of_live_tensors(monkeypatch):
    """By hand: x [1, 4, 8, 8] float32 is an input; while conv2 runs, its input and its output are alive, 4 and 16 channels of 256 bytes."""
    from torch import nn

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 16, 1)

    family = family_named("unet2d")
    monkeypatch.setattr(type(family), "build", lambda self, config: Two())
    monkeypatch.setattr(type(family), "forward", lambda self, model, inputs: model.conv2(model.conv1(inputs["sample"])))
    work = model_work(family, {"sample_size": 8, "in_channels": 4})
    assert work.activation_bytes == (4 + 16) * 8 * 8 * 4
    assert list(work.sites) == ["conv1", "conv2"]


def test_attention_is_never_held_as_a_matrix():
    """Of 32x32 tokens the matrix alone would take 4 MB for each of two heads; the values of a model of 16 channels are far smaller."""
    config = TINY_UNET | {"sample_size": 64}
    assert model_work(family_named("unet2d"), config).activation_bytes < 2 * 4 * 1024 * 1024


def test_keys_and_values_of_cross_attention_share_the_conditioning():
    shared = model_work(family_named("unet2d-condition"), TINY_CONDITION_UNET).shared_input
    first = {shared[name] for name in shared if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(first) == 1
    assert first.pop().endswith("attn2.to_k")

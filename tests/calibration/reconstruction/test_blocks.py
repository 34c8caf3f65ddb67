from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calibration.reconstruction.blocks import blocks_of, check_partition, entropy, traced_calls
from edm_deploy.errors import InputError
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.meta_model import meta_model
from edm_deploy.network.restructure import PUBLISHED
from tests.conftest import TINY, tiny_model


def partitionable(kind):
    """The attributes of a student that the partition uses."""
    family, config, _ = tiny_model(kind)
    return SimpleNamespace(family=family, config=config, structure=PUBLISHED, layers=family.sites(meta_model(family, config)))


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("partition", ["block", "layer"])
def test_every_site_is_in_one_block(kind, partition):
    student = partitionable(kind)
    sites = [site for block in blocks_of(student, partition) for site in block.sites]
    assert sorted(sites) == sorted(student.layers)


def test_a_unet_is_partitioned_into_residual_blocks_attentions_and_remaining_layers():
    student = partitionable("unet2d")
    names = [block.name for block in blocks_of(student, "block")]
    assert names[:5] == [
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0.conv",
    ]
    assert {"mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0.upsamplers.0.conv", "conv_out"} <= set(names)
    assert len(names) == 18


def test_transformer_blocks_are_whole_and_the_projections_around_them_alone():
    student = partitionable("unet2d-condition")
    blocks = {block.name: block for block in blocks_of(student, "block")}
    assert len(blocks["mid_block.attentions.0.transformer_blocks.0"].sites) == 10
    assert blocks["mid_block.attentions.0.proj_in"].sites == ("mid_block.attentions.0.proj_in",)


def test_a_blocks_work_is_that_of_its_layers():
    student = partitionable("unet2d")
    work = model_work(student.family, student.config)
    blocks = blocks_of(student, "block")
    assert sum(block.macs for block in blocks) == sum(site.macs for site in work.sites.values())


def test_shared_arguments_are_distinguished_from_those_of_each_sample():
    student = partitionable("flux")
    block = next(block for block in blocks_of(student, "block") if block.name == "transformer_blocks.0")
    # image, text and time embedding grow with the batch; the rotary table and the empty arguments do not
    assert sorted(block.calls[0].batched) == [0, 0, 0, 1, 1, 1]
    assert block.calls[0].outputs == (1, 1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.once = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.once(self.shared(self.shared(x)))


def test_a_layer_that_runs_twice_is_in_no_block():
    with torch.device("meta"):
        model = Twice()
    family = SimpleNamespace(
        sample_shape=lambda config: (4,),
        random_conditioning=lambda config, batch, generator: {},
        forward=lambda model, inputs: model(inputs["sample"]),
    )
    calls = traced_calls(family, {}, model, ["shared", "once"])
    assert list(calls) == ["once"]
    assert (calls["once"].macs, calls["once"].elements) == (16, 8)


def test_entropy_counts_bits():
    assert entropy(torch.tensor([0.0, 1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert entropy(torch.tensor([0.0] * 7 + [1.0])) == pytest.approx(0.5436, abs=1e-4)  # H(1/8)
    assert entropy(torch.full((5,), 3.0)) == 0.0


def test_high_entropy_joins_a_block_to_the_one_that_feeds_it_and_low_entropy_cuts_it():
    student = partitionable("unet2d")
    plain = blocks_of(student, "block")
    bits = dict.fromkeys(student.layers, 4.0)
    bits |= {
        site: 8.0
        for site in student.layers
        if site.startswith(("mid_block.attentions.0.", "mid_block.resnets.1.", "up_blocks.0.resnets.1."))
    }
    bits |= dict.fromkeys(("conv_in", "conv_out"), 8.0)
    bits |= {site: 1.0 for site in student.layers if site.startswith(("up_blocks.1.", "down_blocks.0.resnets.0."))}
    bits |= dict.fromkeys(("time_embedding.linear_1", "time_embedding.linear_2"), 1.0)
    blocks = blocks_of(student, "entropy", bits)
    joined = {block.modules: block for block in blocks if len(block.modules) > 1}
    # At most two; the up path's block receives a concatenation, which is not the result of a module.
    assert list(joined) == [("mid_block.resnets.0", "mid_block.attentions.0")]
    (pair,) = joined.values()
    assert list(pair.calls[1].wired.values()) == [("mid_block.resnets.0", 0)]
    assert pair.sites == plain[7].sites + plain[8].sites
    assert "down_blocks.0.resnets.0" not in [block.name for block in blocks]
    assert {"down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2"} <= {block.name for block in blocks}
    assert sorted(site for block in blocks for site in block.sites) == sorted(student.layers)


def test_an_unknown_partition_is_refused():
    with pytest.raises(InputError, match="partition is 'half'; expected one of block, layer, entropy"):
        check_partition("half")

from dataclasses import replace

import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.errors import ArtifactError
from edm_deploy.numerics.activation_table import ActivationTable
from tests.edm_deploy.test_older_artifacts import ARTIFACTS

TABLE = ActivationTable(
    bits=4, scale=torch.ones(2), qmin=torch.full((2,), -8, dtype=torch.int8), qmax=torch.full((2,), 7, dtype=torch.int8)
)
# Each channel of its own bits, at its bounds: [-4, 3], [-8, 7], [-127, 127].
MIXED = QuantizedLayer(
    op="linear",
    codes=torch.tensor([[-4, 3], [-8, 7], [-127, 127]], dtype=torch.int8),
    weight_scale=torch.ones(3),
    weight_bits=4,
    activation=TABLE,
    channel_bits=torch.tensor([3, 4, 8], dtype=torch.uint8),
)


def test_a_site_is_called_by_the_bits_that_its_channels_were_chosen_around():
    assert MIXED.scheme == "W4A4"
    assert replace(MIXED, activation=None).scheme == "W4A16"


def test_codes_at_the_bounds_of_their_channel_are_in_order():
    assert MIXED.problem((3, 2), rows=2) is None


def with_code(channel, code):
    codes = MIXED.codes.clone()
    codes[channel, 0] = code
    return replace(MIXED, codes=codes)


@pytest.mark.parametrize(
    ("site", "problem"),
    [
        (with_code(0, -5), "codes of output channel 0 reach [-5, 3], outside [-4, 3] of its 3 bits"),
        (with_code(1, 8), "codes of output channel 1 reach [7, 8], outside [-8, 7] of its 4 bits"),
        (with_code(2, -128), "codes of output channel 2 reach [-128, 127], outside [-127, 127] of its 8 bits"),
        (replace(MIXED, channel_bits=None), "codes reach [-127, 127], outside [-8, 7] of 4 bits"),
        (replace(MIXED, channel_bits=torch.tensor([3, 4], dtype=torch.uint8)), "channel_bits has shape [2], expected [3]"),
        (replace(MIXED, channel_bits=torch.tensor([3, 4, 9], dtype=torch.uint8)), "channel_bits holds 9, expected 2 to 8"),
        (replace(MIXED, channel_bits=torch.tensor([1, 4, 8], dtype=torch.uint8)), "channel_bits holds 1, expected 2 to 8"),
        (replace(MIXED, codes=MIXED.codes[:, :1]), "codes have shape [3, 1], the layer's weight [3, 2]"),
        (replace(MIXED, weight_scale=torch.ones(2)), "weight_scale has shape [2], expected [3]"),
        (replace(MIXED, weight_scale=torch.tensor([1.0, 0.0, 1.0])), "weight_scale holds a value that is not finite and positive"),
        (
            replace(MIXED, activation=replace(TABLE, scale=torch.ones(2, 2))),
            "act_scale has shape [2, 2], expected [2]; a scale for each input channel fits no integer kernel, "
            "put what they differ by into the layer's pre_scale",
        ),
        (replace(MIXED, activation=replace(TABLE, qmin=torch.zeros(3, dtype=torch.int8))), "act_qmin has shape [3], expected [2]"),
    ],
)
def test_what_cannot_run_is_named(site, problem):
    assert site.problem((3, 2), rows=2) == problem


LAYER = "transformer_blocks.0.attn1.to_out.0"
QUERY = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def restructured():
    return Artifact.load(ARTIFACTS / "schema3")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([0.5, 0.0, 2.0, 1.5], rf"Layer '{LAYER}': pre_scale holds a value that is not positive\. Make the artifact again"),
        ([0.5, -1.0, 2.0, 1.5], "not positive"),
        ([0.5, float("inf"), 2.0, 1.5], rf"parameter '{LAYER}.pre_scale' holds NaN or infinity"),
        ([0.5, 1.0], rf"parameter '{LAYER}.pre_scale' has shape \[2\], expected \[4\]"),
    ],
)
def test_a_pre_scale_that_no_network_can_have_is_refused(restructured, scale, message):
    params = restructured.params | {f"{LAYER}.pre_scale": torch.tensor(scale)}
    with pytest.raises(ArtifactError, match=message):
        replace(restructured, params=params).validate()


def test_a_pre_scale_that_no_layer_has_is_refused(restructured):
    params = restructured.params | {f"{QUERY}.pre_scale": torch.ones(4)}
    with pytest.raises(ArtifactError, match=rf"parameter '{QUERY}.pre_scale' is not one of the model's"):
        replace(restructured, params=params).validate()


def test_a_wrong_site_is_named_with_its_layer(restructured):
    site = replace(restructured.sites[QUERY], channel_bits=torch.tensor([2, 4, 4, 4], dtype=torch.uint8))
    with pytest.raises(ArtifactError, match=rf"Site '{QUERY}': codes of output channel 0 reach .* of its 2 bits\. Make the artifact again"):
        replace(restructured, sites=restructured.sites | {QUERY: site}).validate()


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"transformer_blocks.0.ff.net.2": (6, 11)}, r"cannot be split into segments \[6, 11\]: it has 16 input channels"),
        ({}, r"Artifact has site 'transformer_blocks.0.ff.net.2.segment0', which the dit-transformer-2d model of its config does not have"),
    ],
)
def test_sites_and_cuts_that_do_not_belong_together_are_refused(restructured, segments, message):
    structure = replace(restructured.structure, segments=segments)
    with pytest.raises(ArtifactError, match=message):
        replace(restructured, structure=structure).validate()


@pytest.mark.parametrize(
    ("rotated", "message"),
    [
        ({LAYER: 3}, rf"Layer '{LAYER}': its input cannot be rotated in blocks of 3: expected a power of two, 2 to 1024"),
        ({LAYER: 8}, r"it has 4 input channels, expected a size that divides them, such as 4"),
        ({"pos_embed.proj": 4}, r"it is a convolution, expected a linear layer"),
        ({"nothing": 4}, r"Layer 'nothing' is not a convolution or linear layer of this model"),
    ],
)
def test_a_rotation_that_no_network_can_have_is_refused(restructured, rotated, message):
    with pytest.raises(ArtifactError, match=message):
        replace(restructured, structure=replace(restructured.structure, rotated=rotated)).validate()

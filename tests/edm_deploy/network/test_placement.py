import pytest

from edm_deploy.network.placement import QUANTIZED, PlacementRule, group_of, rule_for

RULES = (PlacementRule(r"^conv_in$", "w8a8", "first"), PlacementRule("conv", "float", "second"))


def test_the_first_rule_that_matches_decides():
    assert rule_for("conv_in", RULES).placement == "w8a8"
    assert rule_for("conv_in.1", RULES).placement == "float"
    assert rule_for("attn.to_q", RULES) is QUANTIZED


@pytest.mark.parametrize(
    ("layer", "group"),
    [
        ("time_embedding.linear_1", "time_embedding"),
        ("down_blocks.0.resnets.0.time_emb_proj", "time_embedding"),
        ("down_blocks.0.resnets.0.conv_shortcut", "skip"),
        ("transformer_blocks.0.ff.net.2", "feed_forward"),
        ("mid_block.attentions.0.to_q", "attention"),
        ("down_blocks.0.resnets.0.conv1", "convolution"),
        ("head", "other"),
    ],
)
def test_the_part_of_a_layer_follows_from_its_name(layer, group):
    assert group_of(layer) == group

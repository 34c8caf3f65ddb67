import pytest
import torch
from torch import nn

from edm_deploy.errors import ArtifactError
from edm_deploy.models import family_named
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.low_rank_branch import BranchedLayer, half_values, in_branch
from edm_deploy.network.restructure import NetworkRewrite, layer_of, restructure
from tests.conftest import TINY_UNET


def layers():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(5, 4, 3, stride=2, padding=1),
            "dilated": nn.Conv2d(5, 4, 3, padding="same", dilation=2),
            "linear": nn.Linear(6, 3),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
        }
    )


@pytest.mark.parametrize(("name", "shape"), [("conv", (2, 5, 8, 8)), ("dilated", (2, 5, 8, 8)), ("linear", (2, 7, 6))])
def test_a_branch_takes_over_a_part_of_the_weight(name, shape):
    model, x = layers(), torch.randn(shape)
    expected = model[name](x)
    restructure(model, NetworkRewrite(branches={name: 2}))
    layer = model[name]
    assert isinstance(layer, BranchedLayer)
    torch.testing.assert_close(layer(x), expected, msg="it is 0 at first")
    rows = layer.base.weight.shape[0], layer.base.weight[0].numel()
    layer.branch.set_weights(torch.randn(2, rows[1]), torch.randn(rows[0], 2))
    layer.base.weight = nn.Parameter(layer.base.weight - layer.branch.product().reshape(layer.base.weight.shape))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_a_segment_may_have_a_branch_and_a_base_a_pre_scale():
    model, x = layers(), torch.randn(2, 7, 6)
    expected = model["linear"](x)
    restructure(model, NetworkRewrite({"linear": (2, 4)}, ("linear.segment1.base",), {"linear.segment1": 1}))
    part = model["linear"].segment1
    torch.testing.assert_close(model["linear"](x), expected)
    part.base.pre_scale.data.fill_(2.0)
    part.base.weight.data.div_(2.0)
    part.branch.set_weights(torch.ones(1, 4), torch.ones(3, 1))
    torch.testing.assert_close(model["linear"](x), expected + x[..., 2:].sum(-1, keepdim=True), msg="the branch reads the input itself")


def test_the_rule_of_the_published_layer_decides_for_the_base_and_the_branch_stays_in_floating_point():
    assert {layer_of(f"conv_out.{part}") for part in ("base", "branch.down", "branch.up", "segment0.base")} == {"conv_out"}
    family = family_named("unet2d")
    assert family.rule("conv_out.base") == family.rule("conv_out")
    assert family.placement("up.to_q.branch.up") == "float" and "branch" in family.rule("up.to_q.branch.down").reason
    assert family.group("up.conv_shortcut.branch.down") == family.group("up.conv_shortcut.base") == "skip"
    assert in_branch("a.branch.down") and not in_branch("a.branch")


def test_bases_of_q_k_and_v_still_share_their_input_and_a_branch_costs_what_it_multiplies():
    family, names = family_named("unet2d"), [f"down_blocks.1.attentions.0.to_{letter}" for letter in "qkv"]
    published = model_work(family, TINY_UNET)
    branched = model_work(family, TINY_UNET, NetworkRewrite(branches=dict.fromkeys(names, 4)))
    assert {branched.shared_input[f"{name}.base"] for name in names} == {f"{names[0]}.base"}
    assert [branched.sites[f"{name}.base"] for name in names] == [published.sites[name] for name in names]
    assert branched.macs - published.macs == 3 * 16 * (16 * 4 + 4 * 16), "16 positions, 16 channels"
    assert branched.parameters - published.parameters == 3 * (16 * 4 + 4 * 16)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ({"linear": 4}, r"'linear' cannot have a branch of rank 4: expected 1 to 3, the rank of its weight"),
        ({"conv": 0}, r"'conv' cannot have a branch of rank 0: expected 1 to 4"),
        ({"conv": -1}, "expected 1 to 4"),
        ({"grouped": 1}, "it is a grouped convolution"),
        ({"nothing": 1}, "'nothing' is not a convolution or linear layer of this model"),
    ],
)
def test_a_branch_that_a_layer_cannot_have_is_refused(branches, message):
    with pytest.raises(ArtifactError, match=message):
        restructure(layers(), NetworkRewrite(branches=branches))


def test_branches_are_stored_by_layer_and_summed_up():
    structure = NetworkRewrite(branches={"a": 4, "b.segment0": 8})
    assert NetworkRewrite.from_json(structure.to_json()) == structure and structure
    assert structure.summary() == "2 layers with a float branch: a of rank 4, b.segment0 of rank 8"
    for wrong in ({"branches": ["a"]}, {"branches": {"a": "4"}}, {"branches": {"a": 1.5}}):
        with pytest.raises(ArtifactError, match="structure"):
            NetworkRewrite.from_json(wrong)


def test_weights_become_what_float16_holds():
    found = half_values(torch.tensor([0.1, 1e9, -1e9]))
    assert torch.equal(found, found.half().float()) and bool(found.isfinite().all())

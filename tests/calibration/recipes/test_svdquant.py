import pytest
import torch
from torch import nn

import calibration
from calibration import RunOptions, fit
from calibration.recipes.mse import Mse
from calibration.recipes.svdquant import SvdQuant, rank_within
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import InputError
from edm_deploy.numerics.codes import dequantize_weight
from tests.calibration.tiny import tiny_source
from tests.conftest import tiny_inputs

QUICK = {"rows": 3, "calibration_samples": 2}


def with_outliers():
    """A tiny DiT, 6 of whose 16 input channels of attention and feed-forward are up to 40 times as large as the others, and few singular values of whose
    weights are large: what trained transformers have more of than random ones."""
    source = tiny_source("dit")
    generator = torch.Generator().manual_seed(0)
    for block in source.model.transformer_blocks:
        scale = block.norm1.linear.bias.view(6, -1)
        scale[1, :6] += torch.linspace(10, 40, 6)
        scale[4, :6] += torch.linspace(10, 40, 6)
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.ff.net[0].proj):
            layer.weight.addr_(torch.randn(len(layer.weight), generator=generator), torch.randn(16, generator=generator), alpha=0.5)
    return source


def error(artifact, source, kind):
    inputs = tiny_inputs(kind)
    expected = source.family_object.forward(source.model, inputs)
    return float((Reference(artifact)(inputs) - expected).square().mean() / expected.square().mean())


@pytest.fixture(scope="module")
def outliers():
    source = with_outliers()
    return source, fit(source, SvdQuant(**QUICK, largest_share=0.5), RunOptions())


def test_a_branch_and_what_is_left_of_the_weight_add_up_to_it(outliers):
    source, artifact = outliers
    assert len(artifact.structure.branches) == artifact.provenance["branches"] > 10
    for name, rank in artifact.structure.branches.items():
        site, params = artifact.sites[f"{name}.base"], artifact.params
        down, up = params[f"{name}.branch.down.weight"], params[f"{name}.branch.up.weight"]
        assert down.shape[0] == rank == rank_within(source.model.get_submodule(name), 32, 0.5)
        assert torch.equal(down, down.half().float()) and torch.equal(up, up.half().float())
        if f"{name}.base" not in artifact.structure.pre_scaled and artifact.provenance["smoothed_inputs"] == 0:
            whole = dequantize_weight(site.codes, site.weight_scale) + up @ down
            assert float((whole - source.model.get_submodule(name).weight).norm()) < 0.2 * float(whole.norm())


def test_outliers_cost_a_fraction_of_what_they_cost_without_branch_and_smoothing(outliers):
    source, artifact = outliers
    assert artifact.provenance["smoothed_inputs"] > 0
    plain = fit(source, Mse(weight_bits=4, act_bits=4, **QUICK), RunOptions())
    assert error(artifact, source, "dit") < 0.6 * error(plain, source, "dit")


@pytest.mark.parametrize(
    ("kind", "settings"), [("unet2d", {"rounding": "nearest"}), ("unet2d", {"rounding": "gptq"}), ("dit", {"rotate": "all"})], ids=str
)
def test_with_fine_codes_the_function_is_the_published_one(kind, settings, monkeypatch):
    monkeypatch.setattr(calibration, "fold_pre_scales", lambda artifact: artifact)  # it traces the network, and has tests of its own
    source = tiny_source(kind)
    artifact = fit(source, SvdQuant(weight_bits=8, act_bits=16, smoothing=0.5, **QUICK, **settings), RunOptions())
    assert artifact.provenance["smoothed_inputs"] > 0 and artifact.structure.branches
    assert bool(artifact.structure.rotated) == ("rotate" in settings)
    assert error(artifact, source, kind) < 1e-3  # 8 bits of weight


def test_a_rank_is_lowered_until_its_branch_is_thin():
    wide, conv = nn.Linear(64, 64), nn.Conv2d(16, 32, 3)
    assert rank_within(wide, 32, 0.25) == 8, "8 * (64 + 64) is a quarter of 64 * 64"
    assert rank_within(wide, 4, 0.25) == 4
    assert rank_within(conv, 32, 0.25) == 6, "7 * (32 + 144) is more than a quarter of 32 * 144"
    assert rank_within(wide, 32, 0.0) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"largest_share": 1.5}, "largest_share is 1.5"),
        ({"smoothing": -0.5}, "smoothing is -0.5"),
        ({"rounding": "adaround"}, "rounding is 'adaround'; expected nearest or gptq"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SvdQuant(**settings)


def test_a_rank_that_no_layer_can_use_is_refused():
    with pytest.raises(InputError, match=r"rank is 999; the largest that a layer of this model can use is 16. Set rank to 16 or less"):
        SvdQuant(rank=999).structure(tiny_source("unet2d"))

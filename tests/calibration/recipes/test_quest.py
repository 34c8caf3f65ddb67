import logging

import pytest
import torch

from calibration import RunOptions, fit
from calibration.observers.channel_scaling import ChannelRanges
from calibration.recipes.quest import Quest, observed_scales, rank_one
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_source

QUICK = {"rows": 3, "steps": 2, "batch": 2, "calibration_samples": 2}


def test_scales_that_are_a_product_are_split_without_a_residual():
    table, channel = torch.tensor([1.0, 4.0]), torch.tensor([0.5, 2.0, 1.0])
    split = rank_one(table[:, None] * channel)
    assert torch.allclose(split.log_table, table.log())
    assert torch.allclose(split.log_channel, channel.log())
    assert float(split.residual) == pytest.approx(0, abs=1e-6)


def test_the_residual_is_what_no_product_represents():
    # Logarithms [[1, -1], [-1, 1]]: all row and column means are 0, so the residual is all of it.
    split = rank_one(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).exp())
    assert split.log_channel.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert float(split.residual) == pytest.approx(1.0)


def test_a_dead_channel_counts_a_hundredth_of_the_mean():
    seen = ChannelRanges(torch.tensor([[-1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
    assert observed_scales(seen).tolist() == [[4.0, pytest.approx(0.02)]]


def test_exact_scales_by_channel_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"no integer kernel can compute.*per_channel=split"):
        Quest(per_channel="exact")


@pytest.mark.parametrize(
    ("settings", "match"), [({"per_channel": "on"}, "expected split or off"), ({"tuned": "attention+ff"}, "tuned names 'ff'")]
)
def test_unknown_choices_are_refused(settings, match):
    with pytest.raises(InputError, match=match):
        Quest(**settings)


def test_the_tuned_groups_and_the_residual_are_in_the_provenance(monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("calibration.recipes.quest"), "warning", lambda text, *values: said.append(text % values))
    artifact = fit(tiny_source(), Quest(**QUICK), RunOptions())
    # A pixel UNet has no feed-forward layers.
    assert artifact.provenance["tuned_groups"] == ["time_embedding", "attention"]
    assert 0 < artifact.provenance["tuned_weights"] < 1
    assert artifact.provenance["split_residual_std"] > 0
    assert len(said) == 1
    assert f"{artifact.provenance['split_residual_std']:.3f}" in said[0]


def test_more_bits_than_four_leave_inputs_unscaled():
    artifact = fit(tiny_source(), Quest(**QUICK, act_bits=8), RunOptions())
    assert not artifact.structure.pre_scaled
    assert "split_residual_std" not in artifact.provenance


def test_only_the_tuned_groups_change_their_codes():
    source = tiny_source()
    moved = {"weight_rate": 0.5, "per_channel": "off", "compute": "fp32"}
    start = fit(source, Quest(**QUICK | {"steps": 1}, **moved | {"weight_rate": 0.0}), RunOptions())
    tuned = fit(source, Quest(**QUICK, **moved, tuned="attention"), RunOptions())
    family = tuned.family_object
    changed = {name for name, site in tuned.sites.items() if not torch.equal(site.codes, start.sites[name].codes)}
    assert changed
    assert {family.group(name) for name in changed} == {"attention"}

from __future__ import annotations

import dataclasses

import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.reference import SiteRecord
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.pipelines.source import load_source
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.evaluation.site_agreement import agreement, compare_site, cut_from_trajectory, site_statistics
from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings, reference_trajectory


def site_of(scale: float) -> QuantizedLayer:
    table = ActivationTable(
        bits=4, scale=torch.tensor([scale]), qmin=torch.tensor([-2], dtype=torch.int8), qmax=torch.tensor([13], dtype=torch.int8)
    )
    return QuantizedLayer(
        op="linear", codes=torch.ones(1, 4, dtype=torch.int8), weight_scale=torch.ones(1), weight_bits=4, activation=table
    )


def outputs_of(codes: list[float], y: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.codes": torch.tensor([codes]).to(torch.int8), "a.y": torch.tensor([[y]])}


# x / s is 1.5 (a tie), 2.2, -0.4 and 3: codes 2, 2, 0, 3.
RECORD = SiteRecord(x=torch.tensor([[0.75, 1.1, -0.2, 1.5]]), codes=torch.tensor([[2.0, 2.0, 0.0, 3.0]]), y=torch.tensor([[1.0]]))
ROWS = torch.tensor([0])


def test_equal_codes_agree():
    result = compare_site("a", site_of(0.5), RECORD, outputs_of([2, 2, 0, 3]), ROWS)
    assert (result.codes, result.ties, result.differ, result.output_error) == (4, 0, 0, 0.0)


def test_codes_one_apart_are_a_tie_only_at_a_rounding_tie():
    assert compare_site("a", site_of(0.5), RECORD, outputs_of([1, 2, 0, 3]), ROWS).ties == 1
    assert compare_site("a", site_of(0.5), RECORD, outputs_of([1, 2, 0, 3]), ROWS).differ == 0
    assert compare_site("a", site_of(0.5), RECORD, outputs_of([2, 3, 0, 3]), ROWS).differ == 1
    assert compare_site("a", site_of(0.5), RECORD, outputs_of([0, 2, 0, 3]), ROWS).differ == 1, "two apart is no tie"


def test_output_error_is_relative_to_the_largest_output():
    assert compare_site("a", site_of(0.5), RECORD, outputs_of([2, 2, 0, 3], y=1.25), ROWS).output_error == pytest.approx(0.25)


@pytest.fixture(scope="module")
def reference(chain):
    return reference_trajectory(load_source(chain.model), EvaluationSettings(samples=2, steps=3, seeds=(1,)))


def test_statistics_cover_every_site_and_step(chain, reference):
    artifact = Artifact.load(chain.artifact)
    sites = site_statistics(artifact, reference)
    assert {site.site for site in sites} == set(artifact.sites)
    for site in sites:
        assert len(site.rows) == len(site.sqnr) == 3
        assert all(0 < use <= 1 for use in site.range_use)
        assert all(0 <= share <= 1 for share in site.clipped)


def test_a_wider_table_clips_less_and_uses_less(chain, reference):
    artifact = Artifact.load(chain.artifact)
    name = "conv_in"
    site = artifact.sites[name]
    assert site.activation is not None

    def scaled(factor: float):
        table = dataclasses.replace(site.activation, scale=site.activation.scale * factor)
        changed = dataclasses.replace(artifact, sites={**artifact.sites, name: dataclasses.replace(site, activation=table)})
        return next(entry for entry in site_statistics(changed, reference) if entry.site == name)

    narrow, wide = scaled(0.25), scaled(4.0)
    assert narrow.clipped[0] > 0.1
    assert wide.clipped[0] == 0
    assert wide.range_use[0] < narrow.range_use[0]
    assert wide.sqnr[0] > narrow.sqnr[0]


def test_an_engine_computes_the_reference_s_codes_at_every_site(chain, reference, tmp_path):
    artifact = Artifact.load(chain.artifact)
    cut = cut_from_trajectory(artifact, reference, tmp_path / "cut", dtype=torch.float32)
    sites = agreement(cut, Manifest.read(chain.engine, kind="engine"))
    assert {site.site for site in sites} == set(artifact.sites)
    assert sum(site.differ for site in sites) == 0
    # The reference sums integers exactly; the engine's float32 sums err by 2^-24 a term of at most 144 here.
    assert max(site.output_error for site in sites) < 1e-4


def test_a_guided_model_is_compared_on_both_halves(tmp_path):
    from tests.conftest import artifact_by_hand
    from tests.tools.evaluation.test_trajectory_error import tiny

    trajectory = reference_trajectory(tiny("dit"), EvaluationSettings(samples=2, steps=2, guidance=3.0))
    artifact = artifact_by_hand("dit", weight_bits=8, act_bits=8)
    cut = cut_from_trajectory(artifact, trajectory, tmp_path / "cut", dtype=torch.float32)
    assert cut.timestep.tolist() == [trajectory.timesteps[index] for index in (0, 0, 1, 1)] * 2
    inputs = cut.records["transformer_blocks.0.attn1.to_q"].x
    assert len(inputs) == 8
    assert not torch.allclose(inputs[:4], inputs[4:]), "the label changes the input of the layer"
    assert {site.site for site in site_statistics(artifact, trajectory)} == set(artifact.sites)

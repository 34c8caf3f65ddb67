from dataclasses import replace

import pytest
import torch

from calibration import RunOptions, fit
from calibration.base_pass import PassContext, check_passes
from calibration.passes.adp import Adp, keep_rows, search_ranges, select, similarity, uncertainty
from calibration.recipes.minmax import MinMax
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import InputError
from edm_deploy.pipelines.guidance import Conditioner
from tests.calibration.tiny import tiny_source
from tests.conftest import artifact_by_hand, tiny_inputs

TIMELINE = torch.tensor([[0.0], [0.1], [5.0], [9.9], [10.0]])
GROUPS = torch.tensor([0, 0, 1, 1, 1])


def test_rows_that_share_become_one_and_timesteps_are_reassigned():
    artifact = artifact_by_hand(rows=5)
    found = keep_rows(artifact, torch.tensor([0, 1, 0, 1, 4]))
    found.validate()
    assert found.timesteps.tolist() == [0, 200, 800]
    assert [int(found.row_of_timestep[timestep]) for timestep in artifact.timesteps] == [0, 1, 0, 1, 2]
    table = artifact.sites["conv_in"].activation
    assert torch.equal(found.sites["conv_in"].activation.scale, table.scale[[0, 1, 4]])
    inputs = tiny_inputs("unet2d", batch=2) | {"timestep": torch.tensor([400.0, 800.0])}
    shared = Reference(artifact)(inputs | {"timestep": torch.tensor([0.0, 800.0])})
    # Row 2 uses row 0; the embedding depends on the timestep itself, so only the sample whose row is unchanged has the same output.
    assert torch.equal(Reference(found)(inputs)[1], shared[1])
    assert not torch.equal(Reference(found)(inputs)[0], Reference(artifact)(inputs)[0])


def test_an_artifact_without_shared_rows_is_not_changed():
    artifact = artifact_by_hand(rows=3)
    assert keep_rows(artifact, torch.arange(3)).digest == artifact.digest


def test_a_timestep_between_two_groups_is_uncertain():
    found = uncertainty(torch.tensor([[0.0], [2.0], [4.0], [2.0]]), torch.tensor([0, 0, 1, 1]))
    assert found[1] == pytest.approx(1.0)
    assert float(found[0]) < 0.5


def test_timesteps_are_similar_by_their_distance():
    alike = similarity(TIMELINE, GROUPS)
    torch.testing.assert_close(alike.diag(), torch.ones(5))
    assert alike[0, 1] > alike[0, 2] > alike[0, 4]


def test_without_the_structural_term_the_most_uncertain_timesteps_are_selected():
    gain = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.0])
    assert select(gain, torch.eye(5), 3, 0.0, 4).tolist() == [1, 2, 4]


def test_the_structural_term_selects_representative_timesteps():
    alike = similarity(TIMELINE, GROUPS)
    # In addition to the last one: a neighbour of it adds nothing, one of the first two represents both.
    assert select(torch.zeros(5), alike, 2, 1.0, 4).tolist() in ([0, 4], [1, 4])
    assert select(torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0]), alike, 2, 0.0, 4).tolist() == [3, 4]
    assert select(torch.zeros(5), alike, 5, 1.0, 4).tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def grouped():
    recipe = MinMax(weight_bits=4, act_bits=4, rows=6, calibration_samples=2)
    return fit(tiny_source(), recipe, RunOptions(), passes=[Adp(groups=2, candidates=12, probes=2)])


def test_the_tables_have_one_row_a_group_and_its_timesteps_are_chosen_from_the_candidates(grouped):
    assert len(grouped.timesteps) == 2
    assert {len(site.activation.scale) for site in grouped.sites.values()} == {2}
    assert set(grouped.row_of_timestep.tolist()) == {0, 1}
    assert bool((grouped.timesteps % 83 == 0).all())  # twelve steps of a thousand timesteps
    assert grouped.provenance["passes"]["adp"]["groups"] == 2
    assert Reference(grouped)(tiny_inputs("unet2d")).isfinite().all()


def test_the_range_of_a_group_covers_the_inputs_of_all_of_its_rows():
    recipe = MinMax(rows=3, calibration_samples=2)
    source = tiny_source()
    context = PassContext(source, recipe, Conditioner(source.family_object, source.config), torch.device("cpu"))
    timesteps = torch.tensor([0, 333, 666], dtype=torch.int32)
    alone, pooled = (recipe.student(source, timesteps, torch.device("cpu")) for _ in range(2))
    search_ranges(alone, context, torch.tensor([0, 1, 2]))
    search_ranges(pooled, context, torch.tensor([0, 1, 0]))
    for name, quantizer in pooled.quantizers.items():
        by_row = alone.quantizers[name].log_scale.detach()
        # Min-max at 8 bits: the pooled range is the wider one; a mean of the two would clip the other row's inputs.
        widest = torch.maximum(by_row[0], by_row[2])
        torch.testing.assert_close(quantizer.log_scale.detach(), torch.stack([widest, by_row[1], widest]))


@pytest.mark.parametrize(
    ("settings", "recipe", "message"),
    [
        ({}, {"rows": 4}, r"'adp' does not compose with minmax at rows 4: it needs 8 or more"),
        ({}, {"act_bits": 16}, r"'adp' does not compose with act_bits 16"),
        ({"candidates": 30}, {"rows": 40}, r"adp\.candidates is 30, fewer than the 40 rows to choose"),
    ],
)
def test_incompatible_settings_are_refused(settings, recipe, message):
    with pytest.raises(InputError, match=message):
        check_passes([Adp(**settings)], replace(MinMax(), **recipe))


@pytest.mark.parametrize("setting", ["groups", "candidates", "probes"])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match=rf"adp\.{setting} is 0; expected at least 1"):
        Adp(**{setting: 0})


def test_the_groups_are_in_every_checkpoint_and_determine_the_row_of_a_sample():

    student = MinMax(rows=3).student(tiny_source(), torch.tensor([0, 400, 800], dtype=torch.int32), torch.device("cpu"))
    assert "shared_row" not in student.checkpoint_parameters()
    Adp(groups=2).before(student, None)
    assert student.checkpoint_parameters()["shared_row"].tolist() == [0, 1, 2]
    assert "shared_row" not in student.learnable()
    for quantizer in student.quantizers.values():
        quantizer.log_scale.data = torch.tensor([0.0, 2.0, 0.2])
    assert Adp(groups=2).share_rows(student).tolist() == [0, 1, 0]
    assert student.shared_row.tolist() == [0, 1, 0]
    quantizer = next(iter(student.quantizers.values()))
    with student.at_rows(torch.tensor([0, 1, 2]), torch.device("cpu")):
        assert quantizer.rows.tolist() == [0, 1, 0]

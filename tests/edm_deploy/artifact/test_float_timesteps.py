from dataclasses import replace

import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.float_timesteps import float_activation_graph
from edm_deploy.artifact.reference import Reference, reference_with_correction
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.artifact.timestep_routing import describe_intervals, intervals_from_mask, mask_from_intervals, route_by_timestep
from edm_deploy.errors import ArtifactError
from tests.conftest import tiny_inputs


def relaxed_until(last, timesteps=1000):
    return mask_from_intervals([(0, last)], timesteps)


def test_stretches_and_map_undo_each_other():
    spans = ((0, 1), (5, 5), (8, 9))
    assert mask_from_intervals(spans, 10).tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 1, 1]
    assert intervals_from_mask(mask_from_intervals(spans, 10)) == spans
    assert describe_intervals(spans) == "timesteps 0 to 1, 5 to 5, 8 to 9"


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([(8, 10)], "timesteps 8 to 10 are outside a schedule of 10, expected 0 to 9"),
        ([(-1, 3)], "timesteps -1 to 3 are outside"),
        ([(5, 4)], "timesteps 5 to 4 are outside"),
        ([(0, 4), (4, 5)], "timesteps 4 to 5 overlap an earlier interval"),
    ],
)
def test_an_interval_outside_the_schedule_or_before_another_is_refused(intervals, message):
    with pytest.raises(ArtifactError, match=message):
        mask_from_intervals(intervals, 10)


def test_each_sample_goes_where_its_timestep_belongs_and_comes_back_to_its_place():
    calls = []

    def graph(factor):
        def run(inputs):
            calls.append((factor, inputs["timestep"].tolist()))
            return factor * inputs["sample"]

        return run

    run = route_by_timestep([graph(1), graph(10)], mask_from_intervals([(0, 4)], 10))
    inputs = {"sample": torch.tensor([[1.0], [2.0], [3.0]]), "timestep": torch.tensor([9.0, 2.0, 7.0])}
    assert run(inputs).tolist() == [[1.0], [20.0], [3.0]]
    assert calls == [(1, [9.0, 7.0]), (10, [2.0])]


def test_a_batch_of_one_kind_runs_once_and_uncut():
    seen = []
    run = route_by_timestep([lambda inputs: seen.append(inputs) or inputs["sample"], None], mask_from_intervals([(0, 4)], 10))
    inputs = {"sample": torch.zeros(2, 1), "timestep": torch.tensor([9.0, 8.0])}
    run(inputs)
    assert seen[0] is inputs


def test_the_second_graph_has_the_same_weights_and_no_quantized_input(artifact_w4a4):
    part = float_activation_graph(replace(artifact_w4a4, relaxed=relaxed_until(99)))
    assert part.relaxed is None
    assert all(site.activation is None and site.codes is artifact_w4a4.sites[name].codes for name, site in part.sites.items())


def test_the_whole_reference_relaxes_and_corrects_each_sample_by_its_timestep(artifact_w4a4):
    inputs = tiny_inputs("unet2d", batch=3)  # timesteps 0, 500, 999
    rows = torch.tensor([0] * 600 + [1] * 400, dtype=torch.int32)
    correction = Correction(row_of_timestep=rows, scale=torch.tensor([[1.0] * 3, [0.5] * 3]), input_bias=torch.zeros(2, 3))
    whole = reference_with_correction(replace(artifact_w4a4, relaxed=relaxed_until(99), correction=correction))(inputs)
    first, others = ({name: value[part] for name, value in inputs.items()} for part in (slice(1), slice(1, 3)))  # as they are routed
    relaxed, strict = Reference(float_activation_graph(artifact_w4a4))(first), Reference(artifact_w4a4)(others)
    for index, expected in enumerate((relaxed[0], strict[0], 0.5 * strict[1])):
        torch.testing.assert_close(whole[index], expected)
    assert not torch.allclose(Reference(artifact_w4a4)(first), relaxed, rtol=1e-3)


def test_an_artifact_keeps_both_and_its_digest_sees_them(artifact_w4a4, tmp_path):
    correction = Correction(
        row_of_timestep=artifact_w4a4.row_of_timestep, scale=torch.full((5, 3), 1.1), input_bias=torch.full((5, 3), 0.01)
    )
    artifact = replace(artifact_w4a4, relaxed=relaxed_until(199), correction=correction)
    loaded = Artifact.load(artifact.save(tmp_path / "a"))
    assert loaded.digest == artifact.digest
    assert torch.equal(loaded.relaxed, artifact.relaxed)
    assert torch.equal(loaded.correction.scale, correction.scale)
    digests = {replace(artifact, **change).digest for change in ({}, {"relaxed": None}, {"correction": None})} | {artifact_w4a4.digest}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relaxed": mask_from_intervals([(0, 9)], 10)}, "relaxed has 10 numbers up to 1, expected 1000 of 0 and 1"),
        ({"relaxed": torch.zeros(1000, dtype=torch.uint8)}, "relaxed has 1000 numbers up to 0"),
        (
            {
                "correction": Correction(
                    row_of_timestep=torch.zeros(1000, dtype=torch.int32), scale=torch.ones(1, 4), input_bias=torch.zeros(1, 4)
                )
            },
            r"correction: scale has shape \[1, 4\], expected \[1, 3\]",
        ),
    ],
)
def test_an_artifact_refuses_what_no_runtime_could_do(artifact_w4a4, change, message):
    with pytest.raises(ArtifactError, match=message):
        replace(artifact_w4a4, **change).validate()

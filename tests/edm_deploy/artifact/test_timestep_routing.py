import pytest
import torch

from edm_deploy.artifact.timestep_routing import describe_intervals, intervals_from_mask, mask_from_intervals, route_by_timestep
from edm_deploy.errors import ArtifactError


def test_intervals_and_mask_are_inverse():
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


def test_each_sample_is_computed_by_the_graph_of_its_timestep_and_keeps_its_place():
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


def test_a_batch_for_one_graph_is_not_split():
    seen = []
    run = route_by_timestep([lambda inputs: seen.append(inputs) or inputs["sample"], None], mask_from_intervals([(0, 4)], 10))
    inputs = {"sample": torch.zeros(2, 1), "timestep": torch.tensor([9.0, 8.0])}
    run(inputs)
    assert seen[0] is inputs

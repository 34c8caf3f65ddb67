import pytest
import torch
from torch import nn
from torch.nn import functional

from calibration.observers import input_statistics as observing
from calibration.observers.channel_scaling import channel_ranges
from calibration.observers.input_statistics import input_statistics, input_vectors
from calibration.recipes.mse import Mse
from tests.calibration.tiny import tiny_context

CONV, QUERY = "down_blocks.0.resnets.0.conv1", "up_blocks.0.attentions.0.to_q"


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 3),
        nn.Conv2d(5, 3, 3, stride=2, padding=1),
        nn.Conv2d(5, 3, 1),
        nn.Conv2d(5, 3, (2, 3), padding="same", dilation=2),
        nn.Conv2d(5, 3, 2, padding="valid"),
    ],
    ids=str,
)
def test_an_input_vector_times_the_weight_is_an_output(layer):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 5, 6, 8)
    vectors = input_vectors(layer, x, 1000, torch.Generator().manual_seed(0))
    found = functional.linear(vectors, layer.weight.flatten(1), layer.bias)
    y = layer(x)
    expected = y.flatten(0, -2) if isinstance(layer, nn.Linear) else y.permute(0, 2, 3, 1).flatten(0, 2)
    assert len(found) == len(expected)
    distances = (found[:, None] - expected).detach().norm(dim=2).amin(1)  # samples are in another order
    assert float(distances.max()) < 1e-5
    assert len(input_vectors(layer, x, 4, torch.Generator().manual_seed(0))) == 4


def test_moments_and_rows_are_those_of_the_inputs_along_the_schedule(monkeypatch):
    context = tiny_context(Mse(rows=3))
    ranges = channel_ranges(context, [QUERY])[QUERY]
    context = tiny_context(Mse(rows=3))
    inputs = []
    handle = context.teacher.model.get_submodule(QUERY).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    found = dict(input_statistics(context, [QUERY, CONV], moments=True, seed=0))
    handle.remove()
    assert list(found) == [QUERY, CONV]
    seen, of_query = torch.cat(inputs), found[QUERY]
    torch.testing.assert_close(of_query.moments, seen.T @ seen / len(seen))
    torch.testing.assert_close(of_query.mean, seen.mean(0))
    assert torch.equal(of_query.ranges.high, ranges.high) and torch.equal(of_query.ranges.low, ranges.low)
    assert torch.equal(of_query.vectors[of_query.rows == 2], inputs[0]), "the first input is the noisiest: the table's last row"
    assert found[CONV].vectors.shape[1] == 8 * 9 and found[CONV].moments.shape == (72, 72)
    assert context.trajectories.position.tolist() == [0, 0]


def test_layers_that_do_not_fit_into_memory_together_are_observed_one_after_the_other(monkeypatch):
    whole = dict(input_statistics(tiny_context(Mse(rows=2)), [QUERY, CONV], moments=False, seed=0))
    monkeypatch.setattr(observing, "GROUP_BYTES", 1)
    context, passes = tiny_context(Mse(rows=2)), []
    handle = context.teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    found = dict(input_statistics(context, [QUERY, CONV], moments=False, seed=0))
    handle.remove()
    assert list(found) == list(whole) and len(passes) == 4
    assert len(found[QUERY].moments) == 0 and found[QUERY].vectors.shape == whole[QUERY].vectors.shape

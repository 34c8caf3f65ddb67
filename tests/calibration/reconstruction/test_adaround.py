import pytest
import torch
from torch import nn

from calibration.reconstruction.adaround import AdaRound, begin, commit, exponent_at, logits_of, rectified_sigmoid
from calibration.student.layers import StudentLayer
from calibration.student.quantization_spec import LayerSpec


def layer_of(weight, scale, bits=4):
    weight = torch.as_tensor(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = StudentLayer(linear, LayerSpec(bits, None, True), None)
    layer.set_weight_scale(torch.as_tensor(scale))
    return layer


def test_the_sigmoid_reaches_zero_and_one():
    # sigmoid(V) * 1.2 - 0.1: 0 at sigmoid 1/12, 1 at 11/12, 1/2 at V = 0.
    edge = float(torch.tensor(11.0).log())
    assert rectified_sigmoid(torch.tensor([-edge, 0.0, edge, -9.0, 9.0])).tolist() == pytest.approx([0, 0.5, 1, 0, 1], abs=1e-6)


def test_logits_undo_the_sigmoid():
    share = torch.tensor([0.0, 0.25, 0.5, 0.999])
    assert rectified_sigmoid(logits_of(share)).tolist() == pytest.approx(share.tolist(), abs=1e-6)


def test_the_start_is_the_float_weight_clipped():
    rounding = AdaRound(layer_of([[0.3, -0.26, 9.0, -9.0]], [0.5]))
    assert rounding().tolist()[0] == pytest.approx([0.3, -0.26, 3.5, -4.0])  # codes -8 to 7
    assert rounding.codes().tolist() == [[1, -1, 7, -8]]


def test_the_penalty_is_zero_if_all_weights_are_decided_and_one_per_undecided_weight():
    rounding = AdaRound(layer_of([[0.25, 0.75]], [0.5]))
    assert float(rounding.penalty(2.0).detach()) == pytest.approx(2.0)
    with torch.no_grad():
        rounding.logits.copy_(torch.tensor([[9.0, -9.0]]))
    assert float(rounding.penalty(20.0).detach()) == 0.0


def test_the_exponent_falls_from_twenty_to_two_after_a_fifth_of_the_steps():
    assert exponent_at(0.19) is None
    assert [exponent_at(share) for share in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_committed_codes_are_within_one_of_nearest_and_are_preserved_by_rounding(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 50, generator=generator)
    layer = layer_of(weight, torch.full((6,), 0.7 / 2 ** (bits - 1)), bits)
    nearest, _ = layer.codes()
    (rounding,) = begin([layer])
    with torch.no_grad():
        rounding.logits.copy_(torch.randn(rounding.logits.shape, generator=generator) * 3)
    decided = rounding.codes()
    commit([layer])
    assert layer.rounding is None
    assert torch.equal(layer.codes()[0], decided)  # rounding the committed weight to nearest gives the same codes
    distance = (decided.int() - nearest.int()).abs()
    assert int(distance.max()) == 1
    assert (decided.int() <= 2 ** (bits - 1) - 1).all()
    # The layer computes with the committed weight itself: to a rounding of the float32 product.
    torch.testing.assert_close(layer.rounded_weight(), layer.layer.weight, rtol=1e-6, atol=0)
    assert layer.layer.weight.data_ptr() != weight.data_ptr()


def test_a_weight_is_rounded_away_from_nearest_if_that_lowers_the_output_error():
    # Two equal inputs: 0.4 + 0.4 is nearer to 0 + 1 than to 0 + 0.
    layer = layer_of([[0.4, 0.4]], [1.0])
    (rounding,) = begin([layer])
    x, optimizer = torch.ones(1, 2), torch.optim.Adam(rounding.parameters(), lr=0.05)
    with torch.no_grad():
        rounding.logits += torch.tensor([[0.0, 0.1]])  # breaks the tie
    for step in range(400):
        loss = (layer(x) - 0.8).square().sum()
        exponent = exponent_at(step / 400)
        loss = loss if exponent is None else loss + 0.01 * rounding.penalty(exponent)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert rounding.codes().tolist() == [[0, 1]]

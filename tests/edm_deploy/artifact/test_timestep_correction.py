import pytest
import torch

from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.errors import ArtifactError


def correction(**changes):
    """Rows 0 and 1 of ten timesteps, the first five and the others; two channels."""
    given = {
        "row_of_timestep": torch.tensor([0] * 5 + [1] * 5, dtype=torch.int32),
        "scale": torch.tensor([[2.0, 3.0], [1.0, 1.0]]),
        "input_bias": torch.tensor([[0.5, 0.0], [0.0, -1.0]]),
    }
    return Correction(**given | changes)


SAMPLE = torch.ones(3, 2, 1, 1)
TIMESTEP = torch.tensor([0.0, 4.4, 9.0])  # 4.4 is nearest to 4, of the first row


def test_each_sample_is_corrected_by_its_own_timestep_and_channel():
    assert correction().of_prediction(SAMPLE, TIMESTEP).flatten(1).tolist() == [[2, 3], [2, 3], [1, 1]]
    assert correction().of_sample(SAMPLE, TIMESTEP).flatten(1).tolist() == [[0.5, 1], [0.5, 1], [1, 2]]


def test_channels_of_token_sequences_stand_last():
    tokens = torch.ones(1, 4, 2)
    assert correction().of_prediction(tokens, torch.tensor([0.0]))[0].tolist() == [[2, 3]] * 4


def test_channels_beyond_the_corrected_ones_stay_as_they_are():
    learned_variance = torch.ones(1, 4, 1, 1)
    assert correction().of_prediction(learned_variance, torch.tensor([0.0])).flatten().tolist() == [2, 3, 1, 1]
    assert correction().of_sample(learned_variance, torch.tensor([9.0])).flatten().tolist() == [1, 2, 1, 1]


def test_a_correction_of_ones_and_zeros_changes_no_bit():
    identity = correction(scale=torch.ones(2, 2), input_bias=torch.zeros(2, 2))
    sample = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(identity.of_sample(sample, TIMESTEP), sample)
    assert torch.equal(identity.of_prediction(sample, TIMESTEP), sample)


def test_both_halves_of_a_guided_batch_are_corrected_alike_and_so_is_what_they_combine_to():
    corrected = correction()
    halves, timestep = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 9.0])
    without, given = corrected.of_prediction(halves, timestep.repeat(2)).chunk(2)
    combined = halves[:2] + 3.0 * (halves[2:] - halves[:2])
    torch.testing.assert_close(without + 3.0 * (given - without), corrected.of_prediction(combined, timestep))


def test_around_a_graph_the_sample_is_shifted_before_and_the_prediction_scaled_after():
    run = correction().around(lambda inputs: 10 * inputs["sample"])
    assert run({"sample": SAMPLE[:1], "timestep": TIMESTEP[:1]}).flatten().tolist() == [2 * 10 * 0.5, 3 * 10 * 1.0]


def test_half_precision_stays_half_precision():
    assert correction().of_prediction(SAMPLE.half(), TIMESTEP).dtype == torch.float16


def test_json_holds_it_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    one = correction(
        row_of_timestep=torch.tensor([1, 1, 0, 0, 0, 1, 2, 2, 2, 0], dtype=torch.int32),
        scale=torch.rand(3, 2, generator=generator),
        input_bias=torch.randn(3, 2, generator=generator),
    )
    content = one.to_json()
    assert (content["first"], content["row"]) == ([0, 2, 5, 6, 9], [1, 0, 1, 2, 0])
    again = Correction.from_json(content)
    assert all(torch.equal(getattr(one, name), getattr(again, name)) for name in vars(one))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": [0, 7]}, "points outside its 2 rows"),
        ({"row": [0]}, r"has 1 rows from timesteps \[0, \d+\], expected one from each"),
        ({"first": [0, 10**12]}, r"correction\.first\[1\] is 1000000000000, expected an integer <= 99999"),
        ({"num_train_timesteps": 10**12}, r"correction\.num_train_timesteps is 1000000000000, expected an integer <= 100000"),
        ({"first": [0, 0]}, r"correction\.first is \[0, 0\], expected ascending timesteps"),
        ({"scale": [[1.0], [1.0, 2.0]]}, "rows of different lengths"),
        ({"scale": [[True], [1.0]]}, r"correction\.scale\[0\]\[0\] is true, expected a number"),
        ({"scale": [[1e300, 1.0], [1.0, 1.0]], "input_bias": [[0.0, 0.0], [0.0, 0.0]]}, "scale holds NaN or infinity"),
    ],
    ids=str,
)
def test_json_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ArtifactError, match=message):
        Correction.from_json(correction().to_json() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.ones(2, 3)}, r"scale has shape \[2, 3\], expected \[2, 2\]"),
        ({"input_bias": torch.zeros(1, 2)}, r"input_bias has shape \[1, 2\], expected \[2, 2\]"),
        ({"scale": torch.full((2, 2), torch.nan)}, "scale holds NaN"),
        ({"row_of_timestep": torch.zeros(9, dtype=torch.int32)}, r"row_of_timestep has shape \[9\], expected \[10\]"),
        ({"row_of_timestep": torch.full((10,), 2, dtype=torch.int32)}, "outside its 2 rows"),
    ],
)
def test_what_breaks_its_invariants_is_said(changes, message):
    import re

    assert re.search(message, correction(**changes).problem(10, 2))
    assert correction().problem(10, 2) is None


def test_its_summary_says_how_far_it_goes():
    assert correction().summary() == "prediction times 1.0000 to 3.0000, sample shifted by up to 1.0000, 2 rows"

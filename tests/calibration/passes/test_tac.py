import pytest
import torch

from calibration import RunOptions, fit
from calibration.passes.tac import Estimate, Tac, shrunk
from calibration.recipes.minmax import MinMax
from edm_deploy.errors import InputError
from edm_deploy.pipelines.noise_schedules import DiffusionSchedule
from tests.calibration.tiny import tiny_source

PLAIN = Tac(ridge=0.0, relative=0.0)
SCHEDULE = DiffusionSchedule(torch.tensor([900, 500, 100]), torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64), "epsilon", None)
NOISE = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def one_channel(values):
    return torch.tensor(values).reshape(1, 1, 1, -1)


def test_without_ridge_the_scale_is_that_of_least_squares():
    # q = (1, 2), r = (3, 1): K = (3 + 2) / (1 + 4) = 1.
    assert PLAIN.scale(one_channel([1.0, 2.0]), one_channel([3.0, 1.0])).tolist() == [1.0]
    assert PLAIN.scale(one_channel([1.0, 2.0]), one_channel([2.0, 4.0])).tolist() == [2.0]


def test_the_ridge_regularizes_the_scale_towards_one():
    # q = 1, r = 2, p = 4: (2 + 0.5 * 4) / (1 + 0.5 * 4) = 4 / 3.
    assert Tac(ridge=0.5).scale(one_channel([1.0]), one_channel([2.0])).tolist() == pytest.approx([4 / 3])


def test_the_relative_term_weights_elements_equally_and_excludes_those_beyond_the_threshold():
    # q / r is 2 and 0.5: K = (2.5 / 2) / (4.25 / 2); with the third, far off, left out of the sums but not of the mean.
    found, target = one_channel([2.0, 5.0]), one_channel([1.0, 10.0])
    assert Tac(ridge=0.0, relative=1.0).scale(found, target).tolist() == pytest.approx([2.5 / 4.25])
    beyond = Tac(ridge=0.0, relative=1.0).scale(one_channel([2.0, 5.0, 90.0, 1.0]), one_channel([1.0, 10.0, 1.0, 0.0]))
    assert beyond.tolist() == pytest.approx([2.5 / 4.25])


def test_each_channel_has_its_own_scale():
    target = torch.ones(2, 2, 3, 3)
    found = target / torch.tensor([2.0, 4.0]).reshape(2, 1, 1)
    assert PLAIN.scale(found, target).tolist() == [2.0, 4.0]
    assert PLAIN.scale(found.flatten(2).mT, target.flatten(2).mT).tolist() == [2.0, 4.0]  # tokens: channels last


@pytest.mark.parametrize("settings", [{}, {"relative": 0.8}, {"ridge": 0.0}, {"shift": True}])
def test_zero_error_gives_exactly_the_identity(settings):
    def teacher(sample, timestep):
        return torch.sin(sample) + timestep.reshape(-1, 1, 1, 1) / 1000

    found = Tac(**settings).estimate(teacher, teacher, SCHEDULE, NOISE)
    assert torch.equal(found.scale, torch.ones(3, 2))
    assert torch.equal(found.input_bias, torch.zeros(3, 2))
    assert not found.helps


def test_an_estimate_is_shrunk_by_its_sampling_error():
    # Channel 0: mean 2, variance of the mean 2 / 2 = 1, factor 1 - 1 / 4. Channel 1: mean 0.5 with variance 1: nothing is left.
    assert shrunk(torch.tensor([[1.0, -0.5], [3.0, 1.5]])).tolist() == [1.5, 0.0]
    assert shrunk(torch.tensor([[1.0], [3.0]]), mean=torch.tensor([4.0])).tolist() == [4.0 * (1 - 1 / 16)]
    assert shrunk(torch.tensor([[5.0]])).tolist() == [0.0]  # one trajectory has no variance to measure
    assert shrunk(torch.zeros(3, 1)).tolist() == [0.0]


def test_a_channel_without_signal_is_not_corrected():
    assert Tac().scale(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).tolist() == [1.0]


def test_an_error_that_is_a_scale_is_removed_and_helps():
    found = PLAIN.estimate(lambda sample, timestep: sample, lambda sample, timestep: sample / 2, SCHEDULE, NOISE)
    torch.testing.assert_close(found.scale, torch.full((3, 2), 2.0))
    assert torch.equal(found.input_bias, torch.zeros(3, 2))
    torch.testing.assert_close(found.gains.mean(), torch.tensor(1.0))  # of the four trajectories that were held out
    assert found.helps


def test_the_scale_is_that_of_the_quantized_model_s_own_sample():
    # The student's predictions are the float model's on its own sample, but its sample has left the float trajectory: nothing is to be scaled.
    def teacher(sample, timestep):
        return 0.9 * sample

    def student(sample, timestep):
        return teacher(sample, timestep) + (timestep > 800).float().reshape(-1, 1, 1, 1)

    found = Tac(ridge=0.0).estimate(teacher, student, SCHEDULE, NOISE)
    torch.testing.assert_close(found.scale[:2], torch.ones(2, 2))


def test_each_timestep_is_estimated_on_the_corrected_trajectory():
    # Against a target of zero the scale is zero: the corrected student follows the teacher's trajectory, without a shift.
    found = Tac(ridge=0.0, shift=True).estimate(
        lambda sample, timestep: torch.zeros_like(sample), lambda sample, timestep: torch.full_like(sample, 0.3), SCHEDULE, NOISE
    )
    assert torch.equal(found.input_bias, torch.zeros(3, 2))
    found = Tac(ridge=0.0, shift=True).estimate(lambda x, t: torch.ones_like(x), lambda x, t: x, SCHEDULE, NOISE)
    assert bool((found.input_bias[:2].abs() > 0).all())
    assert torch.equal(
        found.input_bias[2], torch.zeros(2)
    )  # rows ascend with the timestep: the last is the first step, from the same noise


def test_a_correction_that_does_not_help_is_left_out_and_the_provenance_says_so():
    source = tiny_source()
    recipe = MinMax(rows=2, calibration_samples=2)
    artifact = fit(source, recipe, RunOptions(), passes=[Tac(samples=4)])  # W8A8: what is left of the scale is sampling error
    assert artifact.provenance["tac"].keys() == {"error_removed", "applied"}
    assert (artifact.correction is not None) == artifact.provenance["tac"]["applied"]
    always = fit(source, recipe, RunOptions(), passes=[Tac(samples=2, held_out=0.0)])
    assert always.correction is not None
    assert always.provenance["tac"] == {"error_removed": 0.0, "applied": True}


@pytest.mark.parametrize(("gains", "helps"), [([0.2, 0.3], True), ([0.5, -0.4], False), ([-0.2, -0.3], False), ([0.9], False), ([], False)])
def test_a_gain_within_its_standard_error_is_none(gains, helps):
    assert Estimate(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor(gains)).helps is helps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": -1.0}, r"tac\.ridge is -1\.0; expected at least 0\.0"),
        ({"relative": 2.0}, r"tac\.relative is 2\.0"),
        ({"threshold": -1.0}, r"tac\.threshold"),
        ({"samples": 0}, r"tac\.samples"),
        ({"held_out": 1.0}, r"tac\.held_out"),
        ({"steps": 0}, r"tac\.steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Tac(**settings)

import pytest
import torch

from calibration.data.noise_schedules import calibrated_timesteps
from calibration.data.trajectory_pool import Trajectories
from calibration.observers.channel_scaling import channel_ranges
from calibration.recipes.tcaq import RECIPE, lead_anew, reach
from calibration.student.teacher import Teacher
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_source

CPU = torch.device("cpu")


@pytest.fixture
def scene():
    """Recipe, teacher, student and a fresh pool."""
    source, recipe = tiny_source(), RECIPE(rows=4, calibration_samples=4)
    timesteps = calibrated_timesteps(source.scheduler, 4)
    teacher = Teacher(source, CPU)
    student = recipe.student(source, timesteps, CPU, teacher=teacher)
    return recipe, teacher, student, Trajectories(source, timesteps, size=4, eta=0.0, seed=0, device=CPU)


def test_a_channels_reach_weighs_its_maxima_by_themselves():
    # (1 + 9) / (1 + 3) = 2.5 and (4 + 4) / (2 + 2) = 2; in units of their mean, 2.25.
    found = reach(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), groups=2)
    assert found.tolist() == pytest.approx([2.5 / 2.25, 2 / 2.25])


def test_groups_count_their_largest_row_once():
    rows = torch.tensor([[1.0, 1.0], [4.0, 1.0], [2.0, 1.0], [2.0, 1.0]])  # groups reach 4 and 2 in the first channel
    found = reach(rows, groups=2)
    assert float(found[0] / found[1]) == pytest.approx(20 / 6)


def test_a_channel_that_is_always_zero_reaches_the_mean():
    assert reach(torch.tensor([[3.0, 0.0]]), groups=5).tolist() == [1.0, 1.0]
    assert reach(torch.zeros(2, 2), groups=1).tolist() == [1.0, 1.0]


def test_every_quantized_convolution_and_nothing_else_is_reparameterized(scene):
    recipe, teacher, student, pool = scene
    recipe.reparameterize(student, teacher, pool)
    scaled = {name for name, layer in student.layers.items() if layer.pre_scale is not None}
    convolutions = {name for name, layer in student.layers.items() if layer.layer.weight.ndim == 4 and name not in ("conv_in", "conv_out")}
    assert scaled == convolutions
    assert pool.position.tolist() == [0, 0, 0, 0]


def test_inputs_are_evened_out_and_weights_make_up_for_it(scene):
    recipe, teacher, student, pool = scene
    state = {name: value.clone() for name, value in pool.state().items()}
    name = "mid_block.resnets.0.conv1"
    maxima = channel_ranges(student, teacher, pool, [name])[name].magnitude()
    assert maxima.shape == (4, 16)
    pool.load_state(state)
    before = student.layers[name].layer.weight.clone()
    recipe.reparameterize(student, teacher, pool)
    layer = student.layers[name]
    spread = maxima.amax(0)
    evened = spread * layer.pre_scale
    assert float(evened.max() / evened.min()) < float(spread.max() / spread.min())
    # The float function is unchanged: what the input is multiplied by, the weight is divided by.
    torch.testing.assert_close(layer.merged_weight() * layer.pre_scale[:, None, None], before, rtol=1e-6, atol=0)


def test_the_student_leads_its_own_samples(scene):
    _, _, student, pool = scene
    calls = []
    student.register_forward_pre_hook(lambda _, args: calls.append(args[0]["timestep"].unique().tolist()))
    lead_anew(pool, student)
    assert [timestep for (timestep,) in calls] == pool.schedule.timesteps.tolist()
    assert sorted(pool.position.tolist()) == [0, 1, 2, 3]


def test_the_published_constants_are_the_defaults():
    recipe = RECIPE()
    assert (recipe.weight_bits, recipe.act_bits, recipe.strength, recipe.static) == (4, 4, 1.0, False)


@pytest.mark.parametrize("setting", [{"strength": 2.0}, {"groups": 0}, {"rounds": 0}, {"scale_rate": -1.0}, {"bound_rate": -1.0}], ids=str)
def test_a_setting_outside_its_range_is_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        RECIPE(**setting)

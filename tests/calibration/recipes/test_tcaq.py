import pytest
import torch

from calibration.observers.channel_scaling import channel_ranges
from calibration.recipes.tcaq import RECIPE, restart_with_student, weighted_maxima
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_context

TCAQ = RECIPE(rows=4, calibration_samples=4)


@pytest.fixture
def context():
    return tiny_context(TCAQ, samples=4)


def test_a_channels_weighted_maximum_is_the_mean_of_its_maxima_weighted_by_themselves():
    # (1 + 9) / (1 + 3) = 2.5 and (4 + 4) / (2 + 2) = 2; in units of their mean, 2.25.
    found = weighted_maxima(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), groups=2)
    assert found.tolist() == pytest.approx([2.5 / 2.25, 2 / 2.25])


def test_groups_count_their_largest_row_once():
    rows = torch.tensor([[1.0, 1.0], [4.0, 1.0], [2.0, 1.0], [2.0, 1.0]])  # groups reach 4 and 2 in the first channel
    found = weighted_maxima(rows, groups=2)
    assert float(found[0] / found[1]) == pytest.approx(20 / 6)


def test_a_channel_that_is_always_zero_gets_the_mean():
    assert weighted_maxima(torch.tensor([[3.0, 0.0]]), groups=5).tolist() == [1.0, 1.0]
    assert weighted_maxima(torch.zeros(2, 2), groups=1).tolist() == [1.0, 1.0]


def test_every_quantized_convolution_and_nothing_else_is_reparameterized(context):
    student = context.student
    TCAQ.reparameterize(context)
    scaled = {name for name, layer in student.layers.items() if layer.pre_scale is not None}
    convolutions = {name for name, layer in student.layers.items() if layer.layer.weight.ndim == 4}
    assert scaled == {name for name in convolutions if student.family.placement(name) == "quantize"} < convolutions
    assert context.trajectories.position.tolist() == [0, 0, 0, 0]


def test_inputs_are_equalized_and_weights_compensate(context):
    student, pool = context.student, context.trajectories
    state = {name: value.clone() for name, value in pool.state().items()}
    name = "mid_block.resnets.0.conv1"
    maxima = channel_ranges(context, [name])[name].magnitude()
    assert maxima.shape == (4, 16)
    pool.load_state(state)
    before = student.layers[name].layer.weight.clone()
    TCAQ.reparameterize(context)
    layer = student.layers[name]
    spread = maxima.amax(0)
    equalized = spread * layer.pre_scale
    assert float(equalized.max() / equalized.min()) < float(spread.max() / spread.min())
    # The float function is unchanged: what the input is multiplied by, the weight is divided by.
    torch.testing.assert_close(layer.merged_weight() * layer.pre_scale[:, None, None], before, rtol=1e-6, atol=0)


def test_the_student_leads_its_own_samples(context):
    student, pool = context.student, context.trajectories
    calls = []
    student.register_forward_pre_hook(lambda _, args: calls.append(args[0]["timestep"].unique().tolist()))
    restart_with_student(pool, student)
    assert [timestep for (timestep,) in calls] == pool.schedule.timesteps.tolist()
    assert sorted(pool.position.tolist()) == [0, 1, 2, 3]


def test_the_published_constants_are_the_defaults():
    recipe = RECIPE()
    assert (recipe.weight_bits, recipe.act_bits, recipe.strength, recipe.static) == (4, 4, 1.0, False)


@pytest.mark.parametrize("setting", [{"strength": 2.0}, {"groups": 0}, {"rounds": 0}, {"scale_rate": -1.0}, {"bound_rate": -1.0}], ids=str)
def test_a_setting_outside_its_range_is_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        RECIPE(**setting)

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from calibration import RunOptions, fit
from calibration.base_pass import check_passes
from calibration.passes.pcr import Pcr
from calibration.recipes.minmax import MinMax
from edm_deploy.artifact.timestep_routing import intervals_from_mask
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_source

QUICK = MinMax(weight_bits=4, act_bits=4, rows=5, calibration_samples=2)


def test_shares_are_of_the_steps_that_the_scheduler_takes():
    assert intervals_from_mask(Pcr().relaxed(tiny_source())) == ((0, 199),)
    assert intervals_from_mask(Pcr(relax_from=0.0, relax_to=0.2).relaxed(tiny_source())) == ((800, 999),)
    assert intervals_from_mask(Pcr(relax_from=0.5, relax_to=0.6).relaxed(tiny_source())) == ((400, 499),)
    # A shifted flow spends most of its steps at large timesteps: a fifth of them ends at sigma 3 * 0.2 / 1.4.
    ((first, last),) = intervals_from_mask(Pcr().relaxed(replace(tiny_source(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))))
    assert first == 0
    assert last == pytest.approx(1000 * 0.6 / 1.4, abs=20)


def test_an_empty_interval_relaxes_nothing():
    assert Pcr(relax_from=0.5, relax_to=0.5).relaxed(tiny_source()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relax_from": 1.2}, r"pcr\.relax_from is 1\.2"),
        ({"relax_from": 0.5, "relax_to": 0.4}, r"pcr\.relax_to is 0\.4; expected 0\.5 to 1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Pcr(**settings)


def test_incompatible_settings_are_refused():
    with pytest.raises(InputError, match=r"'pcr' does not compose with act_bits 16"):
        check_passes([Pcr()], MinMax(act_bits=16))
    with pytest.raises(InputError, match="leaves activations in floating point everywhere"):
        check_passes([Pcr(relax_from=0.0)], MinMax())


def test_only_the_noisiest_row_is_observed_on_the_same_samples_if_the_student_leads():
    led_by_teacher = fit(tiny_source(), QUICK, RunOptions())
    led_by_student = fit(tiny_source(), QUICK, RunOptions(), passes=[Pcr(relax_to=0.8)])
    first, second = (artifact.sites["down_blocks.0.resnets.0.conv1"].activation.scale for artifact in (led_by_teacher, led_by_student))
    assert led_by_student.relaxed is None
    assert first[-1] == second[-1]
    assert bool((first[:-1] != second[:-1]).all())


def test_at_float_rows_the_student_computes_with_float_activations():
    from calibration.base_pass import PassContext
    from edm_deploy.pipelines.guidance import Conditioner
    from tests.conftest import tiny_inputs

    source, timesteps = tiny_source(), torch.tensor([0, 300, 600, 900], dtype=torch.int32)
    rounded, relaxed, weight_only = (
        recipe.student(source, timesteps, torch.device("cpu")) for recipe in (QUICK, QUICK, MinMax(weight_bits=4, act_bits=16))
    )
    context = PassContext(
        source=source, recipe=QUICK, conditioner=Conditioner(source.family_object, source.config), device=torch.device("cpu")
    )
    Pcr(relax_from=0.6).before(relaxed, context)
    inputs = tiny_inputs("unet2d", batch=2)  # timesteps 0 and 999
    # The family's kept layers have 8-bit weights in both, so the students differ only in their activations.
    torch.testing.assert_close(relaxed(inputs)[0], weight_only(inputs)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(relaxed(inputs)[1], rounded(inputs)[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rounded(inputs)[0], weight_only(inputs)[0], rtol=1e-3)

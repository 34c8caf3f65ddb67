from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from calibration import RunOptions, fit
from calibration.base_pass import check_passes
from calibration.data.trajectory_pool import Trajectories
from calibration.passes.pcr import Pcr
from calibration.recipes.minmax import MinMax
from edm_deploy.artifact.reference import Reference
from edm_deploy.artifact.relaxed_timesteps import relaxed_graph
from edm_deploy.artifact.timestep_routing import intervals_from_mask
from edm_deploy.errors import InputError
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from tests.calibration.tiny import tiny_source

QUICK = MinMax(weight_bits=4, act_bits=4, rows=5, calibration_samples=2)


def test_shares_are_of_the_steps_that_the_scheduler_takes():
    assert intervals_from_mask(Pcr().relaxed(tiny_source())) == ((800, 999),)
    last = Pcr(relax_from=0.8, relax_to=1.0)
    assert intervals_from_mask(last.relaxed(tiny_source())) == ((0, 199),)
    assert intervals_from_mask(Pcr(relax_from=0.5, relax_to=0.6).relaxed(tiny_source())) == ((400, 499),)
    # A shifted flow spends most of its steps at large timesteps: a fifth of them ends at sigma 3 * 0.2 / 1.4.
    ((first, last),) = intervals_from_mask(last.relaxed(replace(tiny_source(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))))
    assert first == 0
    assert last == pytest.approx(1000 * 0.6 / 1.4, abs=20)


def test_an_empty_interval_relaxes_nothing():
    assert Pcr(relax_from=0.5, relax_to=0.5).relaxed(tiny_source()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relax_from": 1.2}, r"pcr\.relax_from is 1\.2"),
        ({"relax_from": 0.5, "relax_to": 0.4}, r"pcr\.relax_to is 0\.4; expected 0\.5 to 1\.0"),
        ({"relaxed_bits": 10}, r"pcr\.relaxed_bits is 10; expected 8, or 16 for floating point"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Pcr(**settings)


def test_incompatible_settings_are_refused():
    with pytest.raises(InputError, match=r"'pcr' does not compose with act_bits 16"):
        check_passes([Pcr()], MinMax(act_bits=16))
    with pytest.raises(InputError, match=r"relaxes every timestep\. Relax less, or set act_bits to 8"):
        check_passes([Pcr(relax_to=1.0)], MinMax(act_bits=4))


def test_only_the_noisiest_row_is_observed_on_the_same_samples_if_the_student_leads():
    led_by_teacher = fit(tiny_source(), QUICK, RunOptions())
    led_by_student = fit(tiny_source(), QUICK, RunOptions(), passes=[Pcr(relax_to=0.0)])
    # The first layer: the inputs of the others differ at every row, since the layers before them are quantized.
    first, second = (artifact.sites["conv_in"].activation.scale for artifact in (led_by_teacher, led_by_student))
    assert led_by_student.relaxed is None
    assert first[-1] == second[-1]
    assert bool((first[:-1] != second[:-1]).all())


def test_a_range_is_observed_behind_layers_that_are_quantized_at_its_row_already():
    """Inside the network: the second convolution's input is what the quantized first one computes, at the noisiest row too, where all start alike."""
    outside = fit(tiny_source(), QUICK, RunOptions())
    inside = fit(tiny_source(), QUICK, RunOptions(), passes=[Pcr(relax_to=0.0)])
    site = "down_blocks.0.resnets.0.conv2"
    inputs = Reference(inside).record(noisiest())[site].x  # conv_in and conv1 before it are quantized
    low, high = min(float(inputs.min()), 0.0), max(float(inputs.max()), 0.0)
    found, other = (float(artifact.sites[site].activation.scale[-1]) for artifact in (inside, outside))
    assert found == pytest.approx((high - low) / 15, rel=1e-5)
    assert found != other


def noisiest():
    """The samples that the noisiest row of QUICK is observed on."""
    source = tiny_source()
    pool = Trajectories(source, calibrated_timesteps(source.scheduler, 5), size=2, eta=0.0, seed=0, device=torch.device("cpu"))
    return pool.next_batch(2).inputs


def test_relaxed_steps_have_8_bit_tables_from_the_same_observations_and_the_same_codes():
    artifact = fit(tiny_source(), QUICK, RunOptions(), passes=[Pcr()])
    assert intervals_from_mask(artifact.relaxed) == ((800, 999),)
    assert artifact.relaxed_bits == 8
    for name, site in relaxed_graph(artifact).sites.items():
        own = artifact.sites[name]
        assert site.codes is own.codes
        assert (site.activation.bits, int(site.activation.qmin[0]), int(site.activation.qmax[0])) == (8, -128, 127)
        if own.activation.bits == 8:  # a layer that the family keeps at 8 bits
            assert own.relaxed_activation is None and site.activation is own.activation
            continue
        # minmax: 15 steps of 4 bits cover [low, high], 127 steps of 8 bits max(-low, high). The rows that share a fit share its samples.
        table = own.activation
        largest = torch.maximum(-table.qmin * table.scale, table.qmax * table.scale)
        assert bool(((site.activation.scale * 127 - largest).abs() <= table.scale).all())
    assert artifact.sites["conv_in"].scheme == "W8A8"


def test_nothing_is_relaxed_to_8_bits_where_all_inputs_have_8():
    assert fit(tiny_source(), MinMax(rows=3, calibration_samples=1), RunOptions(), passes=[Pcr()]).relaxed is None


@pytest.mark.parametrize("bits", [8, 16])
def test_at_relaxed_rows_the_student_computes_as_the_second_graph_does(bits):
    from calibration.base_pass import PassContext
    from edm_deploy.pipelines.guidance import Conditioner
    from tests.conftest import tiny_inputs

    source, timesteps = tiny_source(), torch.tensor([0, 300, 600, 900], dtype=torch.int32)
    wide = MinMax(weight_bits=4, act_bits=bits)
    rounded, relaxed, wider = (recipe.student(source, timesteps, torch.device("cpu")) for recipe in (QUICK, QUICK, wide))
    context = PassContext(
        source=source, recipe=QUICK, conditioner=Conditioner(source.family_object, source.config), device=torch.device("cpu")
    )
    Pcr(relax_from=0.6, relax_to=1.0, relaxed_bits=bits).before(relaxed, context)
    inputs = tiny_inputs("unet2d", batch=2)  # timesteps 0 and 999
    # The family's kept layers have 8-bit weights in all, so the students differ only in their inputs; all scales are 1.
    torch.testing.assert_close(relaxed(inputs)[0], wider(inputs)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(relaxed(inputs)[1], rounded(inputs)[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rounded(inputs)[0], wider(inputs)[0], rtol=1e-3)

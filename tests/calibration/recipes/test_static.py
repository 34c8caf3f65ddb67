import pytest
import torch

from calibration import RunOptions, fit
from calibration.recipes.mse import Mse
from calibration.recipes.static import Static
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_source

SETTINGS = {"rows": 4, "calibration_samples": 4}


def tables(artifact):
    return {name: site.activation for name, site in artifact.sites.items()}


@pytest.fixture(scope="module")
def plain():
    return fit(tiny_source(), Static(**SETTINGS, weight_bits=4, act_bits=4), RunOptions())


def test_every_row_is_the_same_and_bounds_are_symmetric(plain):
    for table in tables(plain).values():
        assert len(table.scale) == 4
        assert len(table.scale.unique()) == len(table.qmin.unique()) == len(table.qmax.unique()) == 1
        if table.bits == 4:
            assert (int(table.qmin[0]), int(table.qmax[0])) == (-7, 7)


def test_the_largest_magnitude_of_all_timesteps_is_the_largest_code(plain):
    from calibration.recipes.minmax import MinMax

    by_row = tables(fit(tiny_source(), MinMax(**SETTINGS, weight_bits=4, act_bits=4, symmetric=True), RunOptions()))
    # minmax clips nothing at any of its rows; one scale for all must be the largest of them.
    for name, table in tables(plain).items():
        assert torch.isclose(table.scale[0], by_row[name].scale.max())


def test_the_mse_calibrator_differs_from_the_recipe_mse_by_the_timesteps_alone():
    static = fit(tiny_source(), Static(**SETTINGS, act_bits=4, symmetric=False, calibrator="mse"), RunOptions())
    timed = fit(tiny_source(), Mse(**SETTINGS, act_bits=4), RunOptions())
    for name, site in static.sites.items():
        assert torch.equal(site.codes, timed.sites[name].codes)
        assert torch.equal(site.weight_scale, timed.sites[name].weight_scale)
        assert float(timed.sites[name].activation.scale.min()) <= 1.5 * float(site.activation.scale[0])
    assert len({float(scale) for site in timed.sites.values() for scale in site.activation.scale}) > len(timed.sites)


def test_an_unknown_calibrator_is_refused():
    with pytest.raises(InputError, match="calibrator is 'entropy'; expected max or mse"):
        Static(calibrator="entropy")

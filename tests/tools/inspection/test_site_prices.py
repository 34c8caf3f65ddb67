import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy.network.layer_costs import model_work
from edm_deploy_tools.inspection.site_prices import site_prices
from edm_deploy_tools.roofline import layers_of, roofline
from engines.performance.gpus import gpu_named
from tests.conftest import tiny_model


def test_prices_are_those_of_the_roofline(save_tiny_pipeline, tmp_path):
    layers = layers_of(str(save_tiny_pipeline(tmp_path / "model")))
    prices = site_prices(layers.work, "rtx3090", 4)
    expected = roofline(layers, gpu_named("rtx3090"), 4).sites
    assert set(prices) == set(layers.work.sites)
    for name in layers.four_bit:
        assert (prices[name].int4, prices[name].int8) == (expected[name]["int4"].seconds, expected[name]["int8"].seconds)


def test_without_int4_both_are_those_of_int8_and_an_unknown_gpu_is_refused():
    family, config, _ = tiny_model("unet2d")
    work = model_work(family, config)
    assert all(price.int4 == price.int8 for price in site_prices(work, "h200", 1).values())
    with pytest.raises(UnsupportedError, match="rtx3090"):
        site_prices(work, "rtx1", 1)

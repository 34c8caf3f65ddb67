import importlib.util

import pytest
import torch

from edm_deploy_tools.benchmarks import comfy_kitchen
from edm_deploy_tools.benchmarks.comfy_kitchen import PACKAGE, comfy_kitchen_calls
from edm_deploy_tools.benchmarks.layer_shapes import Layer

CPU = torch.device("cpu")


def linear(channels):
    return Layer("linear", channels, 48, 24, 1, 1, 1, 1)


@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="comfy-kitchen is not installed: 68 MB of GPU kernels, which the tests do not need"
)
@pytest.mark.parametrize(("channels", "kinds"), [(512, ["W8A8", "W4A4"]), (320, ["W8A8"])])
def test_its_layers_compute_something_of_the_layers_shape(channels, kinds):
    calls = comfy_kitchen_calls(linear(channels), 2, CPU)
    assert list(calls) == kinds
    for call in calls.values():
        y = call()
        assert y.shape == (2, 24, 48)
        assert float(y.float().std()) == pytest.approx(channels**0.5, rel=0.3)


def test_convolutions_and_machines_without_it_have_none(monkeypatch):
    assert comfy_kitchen_calls(Layer("conv", 32, 32, 8, 8, 3, 1, 1), 2, CPU) == {}
    monkeypatch.setattr(comfy_kitchen.importlib.util, "find_spec", lambda name: None)
    assert comfy_kitchen_calls(linear(512), 2, CPU) == {}

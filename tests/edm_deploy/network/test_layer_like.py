from __future__ import annotations

from torch import nn

from edm_deploy.network.layer_like import layer_like


def test_a_convolution_keeps_its_geometry_and_has_no_data():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, padding_mode="reflect")
    made = layer_like(conv, 5, 7, bias=False)
    assert made.weight.shape == (7, 5, 3, 3) and made.weight.is_meta and made.bias is None
    geometry = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    assert [getattr(made, name) for name in geometry] == [getattr(conv, name) for name in geometry]


def test_a_linear_layer_has_the_given_features():
    made = layer_like(nn.Linear(4, 6), 5, 7, bias=True)
    assert (made.in_features, made.out_features, made.bias.shape) == (5, 7, (7,))

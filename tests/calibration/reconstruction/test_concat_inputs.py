import pytest
import torch
from torch import nn

from calibration.reconstruction.concat_inputs import concatenated_inputs
from calibration.student.layers import ActivationQuantizer, StudentLayer
from calibration.student.quantization_spec import LayerSpec, QuantRange
from edm_deploy.network.restructure import SplitInputLayer
from tests.conftest import tiny_model


def test_a_unets_shortcuts_receive_a_concatenation_with_the_skip_connection():
    family, config, _ = tiny_model("unet2d")
    assert concatenated_inputs(family, config, through=False) == {
        "up_blocks.0.resnets.0.conv_shortcut": (16, 16),
        "up_blocks.0.resnets.1.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.0.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.1.conv_shortcut": (8, 8),
    }


def test_segments_continue_behind_norm_and_activation():
    family, config, _ = tiny_model("unet2d")
    direct, through = (concatenated_inputs(family, config, through=value) for value in (False, True))
    assert through == direct | {name.replace("conv_shortcut", "conv1"): sizes for name, sizes in direct.items()}


@pytest.mark.parametrize(("kind", "found"), [("dit", {}), ("flux", {"single_transformer_blocks.0.proj_out": (32, 128)})])
def test_layers_are_found_by_their_input_and_not_by_name(kind, found):
    family, config, _ = tiny_model(kind)
    assert concatenated_inputs(family, config, through=False) == found


def test_a_split_layer_equals_the_whole_one_where_its_parts_have_one_scale():
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 5, 1).requires_grad_(False)
    spec = LayerSpec(4, 4, False)

    def layer_of(part):
        quantizer = ActivationQuantizer(spec, 1)
        quantizer.set_row(0, QuantRange(0.25, -7))
        quantizer.rows = torch.zeros(3, dtype=torch.int64)
        layer = StudentLayer(part, spec, quantizer)
        layer.set_weight_scale(torch.full((5,), 0.06))
        return layer

    whole, cut = layer_of(conv), SplitInputLayer(conv, (4, 2))
    for name, part in list(cut.named_children()):
        setattr(cut, name, layer_of(part))
    x = torch.randn(3, 6, 4, 4, generator=generator)
    # Codes and scales are the same; the sum over six channels is taken in two.
    torch.testing.assert_close(cut(x), whole(x), rtol=1e-5, atol=1e-5)

import pytest
import torch

from edm_deploy.artifact.disk_format import LayerDescription, TensorReader, layer_from_tensors, tensor_from_param, tensors_from_layer
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.errors import ArtifactError
from tests.conftest import table_by_hand


def a_layer(bits, *, quantized_input=True, channel_bits=None):
    codes = torch.arange(-3, 3, dtype=torch.int8).reshape(2, 3) * (1 if bits == 4 else 20)
    activation = table_by_hand(8, 1.0, rows=2) if quantized_input else None
    return QuantizedLayer(
        op="linear", codes=codes, weight_scale=torch.ones(2), weight_bits=bits, activation=activation, channel_bits=channel_bits
    )


def described(layer):
    bits = layer.activation.bits if layer.activation else None
    return LayerDescription(op=layer.op, weight_shape=tuple(layer.codes.shape), weight_bits=layer.weight_bits, act_bits=bits)


@pytest.mark.parametrize("quantized_input", [True, False])
@pytest.mark.parametrize("channel_bits", [None, torch.tensor([3, 4], dtype=torch.uint8)], ids=["one", "mixed"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_comes_back_from_its_tensors(bits, channel_bits, quantized_input):
    layer = a_layer(bits, quantized_input=quantized_input, channel_bits=channel_bits)
    reader = TensorReader({name: tensor.make() for name, tensor in tensors_from_layer("mid.0", layer).items()})
    again = layer_from_tensors("mid.0", described(layer), reader)
    reader.check_all_taken()
    assert torch.equal(again.codes, layer.codes) and torch.equal(again.weight_scale, layer.weight_scale)
    assert (again.scheme, again.op) == (layer.scheme, layer.op)
    assert (again.activation is None) == (layer.activation is None)
    assert again.activation is None or again.activation.equals(layer.activation)
    assert (again.channel_bits is None) == (channel_bits is None)
    assert channel_bits is None or torch.equal(again.channel_bits, channel_bits)


def test_the_names_in_the_file_are_these():
    names = set(tensors_from_layer("mid.0", a_layer(4, channel_bits=torch.tensor([4, 4], dtype=torch.uint8))))
    assert names == {f"sites.mid.0.{leaf}" for leaf in ("codes", "weight_scale", "channel_bits", "act_scale", "act_qmin", "act_qmax")}


def test_four_bit_codes_are_packed_two_to_a_byte():
    tensors = {bits: tensors_from_layer("x", a_layer(bits))["sites.x.codes"] for bits in (4, 8)}
    assert (tensors[4].dtype, tensors[4].shape) == (torch.uint8, (3,))
    assert (tensors[8].dtype, tensors[8].shape) == (torch.int8, (2, 3))


def test_a_shape_of_more_codes_than_the_file_has_is_refused_before_anything_is_allocated():
    layer = a_layer(4)
    reader = TensorReader({name: tensor.make() for name, tensor in tensors_from_layer("x", layer).items()})
    huge = LayerDescription(op="linear", weight_shape=(2**24, 2**24, 2**24, 2**24), weight_bits=4, act_bits=8)
    with pytest.raises(ArtifactError, match=r"tensor 'sites\.x\.codes' holds 6 codes, expected 79228162514264337593543950336 of shape"):
        layer_from_tensors("x", huge, reader)


def test_a_parameter_is_stored_in_float16_only_where_that_is_exact():
    assert tensor_from_param(torch.tensor([0.5, 2.0])).dtype == torch.float16
    assert tensor_from_param(torch.tensor([0.1])).dtype == torch.float32

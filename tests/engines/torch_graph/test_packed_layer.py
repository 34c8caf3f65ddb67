import pytest
import torch
from torch import nn

from edm_deploy.errors import ArtifactError
from edm_deploy.numerics.kernel_layout import bits_of, pack_codes, unpack_codes
from engines.torch_graph.packed_layer import integers, layer_from_tensors, tensor_name, tensors_from_layer, widened
from tests.engines.rewritten import packed_site, site_of


def layer(channels: int = 5) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, 7, 3)


def test_what_is_stored_comes_back_with_what_follows_from_it():
    site = site_of(layer(), low=-3)
    found = packed_site(site)
    assert found.kind == "u4"
    assert torch.equal(unpack_codes(found.weight, 4, channels=5).transpose(1, 2).reshape(7, 5, 3, 3), site.codes)
    assert found.weight_sum.tolist() == site.codes.flatten(1).sum(1).tolist()
    assert found.inv_scale.tolist() == site.activation.inv_scale.tolist()
    assert (found.qmin.tolist(), found.qmax.tolist()) == ([-3, -3], [12, 12])
    assert found.zero.tolist() == [[0x33] * 16] * 2  # real 0 is code 0 - qmin, in both nibbles


@pytest.mark.parametrize("channels", [1, 5, 32, 33])
def test_a_weight_widened_to_eight_bits_holds_the_same_codes(channels):
    site = site_of(layer(channels))
    wide = widened(tensors_from_layer("conv", site, "u4")["sites.conv.weight"], channels)
    assert torch.equal(wide, tensors_from_layer("conv", site, "s8")["sites.conv.weight"])


def test_a_weight_that_starts_between_16_bytes_is_moved_once():
    """A view into a file's bytes. The kernels copy 16 bytes at a time."""
    tensors = tensors_from_layer("conv", site_of(layer()), "u4")
    weight = tensors[name := tensor_name("conv", "weight")]
    memory = torch.empty(weight.numel() + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + 8
    tensors[name] = memory[start : start + weight.numel()].view(weight.shape).copy_(weight)
    found = layer_from_tensors("conv", tensors, packed="u4", kind="u4", weight_shape=(7, 5, 3, 3), bias=None, dtype=torch.float16)
    assert (tensors[name].data_ptr() % 16, found.weight.data_ptr() % 16) == (8, 0)
    assert torch.equal(found.weight, weight)


def test_a_site_that_runs_widened_stores_signed_codes():
    found = packed_site(site_of(layer(), low=-3), kind="s8")
    assert (found.kind, found.zero.unique().tolist()) == ("s8", [0])


def test_a_site_without_kernel_holds_its_weight_dequantized():
    site = site_of(layer())
    found = packed_site(site, kind=None)
    assert (found.kind, found.weight.dtype, found.zero) == (None, torch.float16, None)
    assert torch.equal(found.weight, (site.codes * site.weight_scale[:, None, None, None]).half())


def test_a_missing_tensor_is_named():
    tensors = tensors_from_layer("conv", site_of(layer()), "u4")
    del tensors[tensor_name("conv", "weight_sum")]
    with pytest.raises(ArtifactError, match=r"Site 'conv': the engine holds no weight_sum\. Build it again"):
        layer_from_tensors("conv", tensors, packed="u4", kind="u4", weight_shape=(7, 5, 3, 3), bias=None, dtype=torch.float16)


def test_sites_quantize_alike_where_table_and_kind_are_the_same():
    first = packed_site(site_of(layer()))
    assert first.quantizes_like(packed_site(site_of(layer())))
    assert not first.quantizes_like(packed_site(site_of(layer(), low=-5)))
    assert not first.quantizes_like(packed_site(site_of(layer(), scale=0.3)))
    assert not first.quantizes_like(packed_site(site_of(layer()), kind="s8"))


@pytest.mark.parametrize(("kind", "low"), [("s4", -8), ("u4", -3), ("s8", -8)])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 6, 5), (2, 5), (2, 3, 4, 5)], ids=["map", "tokens", "vector", "four axes"])
def test_stored_codes_unpack_to_integers_in_the_shape_of_the_input(kind, low, shape):
    codes = torch.randint(low, low + 16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    qmin = torch.tensor([low, low])
    is_map = shape == (2, 5, 3, 4)
    rows = codes.permute(0, 2, 3, 1) if is_map else codes.reshape(2, -1, 1, 5)
    packed = pack_codes(rows - low if kind == "u4" else rows, bits_of(kind))
    assert torch.equal(integers(packed, kind, qmin, codes), codes)

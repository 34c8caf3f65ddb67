import pytest
import torch
from torch import nn
from torch.nn import functional

from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import UnsupportedError
from edm_deploy.numerics.activation_table import quantize_activation
from engines.torch_graph.rewrite import cut_at_layers, rows_at, site_node
from tests.conftest import artifact_by_hand, tiny_inputs
from tests.engines.rewritten import ROW_OF_TIMESTEP, calls, drafted, drafted_artifact, program_of, site_of

TIMESTEPS = torch.tensor([100.0, 900.0, 499.5])  # rows 0, 1 and, rounded half to even, 1


@pytest.fixture(scope="module")
def artifact():
    return artifact_by_hand()


def by_hand(x, layer, site):
    """A site in plain float64, straight from its definition."""
    rows = rows_at(TIMESTEPS, ROW_OF_TIMESTEP).long()
    codes = quantize_activation(x.float(), site.activation, rows).double()
    scale = site.activation.scale[rows].double().reshape(-1, *[1] * (x.ndim - 1))
    weight = site.codes.double()
    if site.op == "conv2d":
        total = functional.conv2d(codes, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return total * scale * site.weight_scale.double()[:, None, None] + layer.bias.double()[:, None, None]
    return functional.linear(codes, weight) * scale * site.weight_scale.double() + layer.bias.double()


def close_to_half(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=1e-4)


def test_rows_are_those_of_the_nearest_timestep_within_the_schedule():
    assert rows_at(torch.tensor([-3.0, 499.4, 499.6, 5000.0]), ROW_OF_TIMESTEP).tolist() == [0, 0, 1, 1]
    assert rows_at(TIMESTEPS, ROW_OF_TIMESTEP).dtype == torch.int32


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 0, 1), (2, 0, 3)])
def test_a_convolution_uses_the_row_of_each_sample(stride, padding, kernel):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, kernel, stride=stride, padding=padding)
    site = site_of(layer, low=-3)
    x = torch.randn(3, 5, 6, 6).half()
    (found,) = drafted(nn.Sequential(layer), {"0": site}, x).module()(x, TIMESTEPS)
    close_to_half(found, by_hand(x, layer, site))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 2, 4, 5)])
def test_a_linear_with_any_leading_dimensions(shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 7), torch.randn(shape).half()
    site = site_of(layer)
    (found,) = drafted(nn.Sequential(layer), {"0": site}, x).module()(x, TIMESTEPS)
    close_to_half(found, by_hand(x, layer, site))


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, x):
        return self.q(x) + self.k(x) * self.v(x)


def test_siblings_that_quantize_alike_share_one_quantize():
    model, x = Siblings(), torch.randn(3, 4, 5).half()
    alike = {name: site_of(getattr(model, name)) for name in "qkv"}
    assert calls(drafted(model, alike, x).graph, "quantize") == 1
    other = alike | {"v": site_of(model.v, scale=0.3)}
    result = drafted(model, other, x)
    assert calls(result.graph, "quantize") == 2
    assert result.codes["q"] is result.codes["k"] is not result.codes["v"]


class TimeEmbedding(nn.Module):
    """Two blocks that each apply SiLU to one vector before they project it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, x):
        return self.a(nn.functional.silu(x)) + self.b(nn.functional.silu(x))


def test_a_value_that_two_blocks_compute_is_computed_and_quantized_once():
    model, x = TimeEmbedding(), torch.randn(3, 5).half()
    result = drafted(model, {name: site_of(getattr(model, name)) for name in "ab"}, x)
    assert (calls(result.graph, "silu"), calls(result.graph, "quantize")) == (1, 1)
    assert result.codes["a"] is result.codes["b"]


def test_a_site_that_no_kernel_computes_keeps_exact_codes():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=3)
    x, site = torch.randn(3, 6, 5, 5).half(), site_of(layer)
    (found,) = drafted(nn.Sequential(layer), {"0": site}, x, kinds={"0": None}).module()(x, TIMESTEPS)
    torch.testing.assert_close(found.double(), by_hand(x, layer, site), rtol=0.01, atol=0.01)  # weights and products in float16


def test_a_layer_whose_weight_feeds_no_product_is_named():
    x = torch.randn(3, 5).half()
    graph = drafted(nn.Sequential(nn.Linear(5, 7)), {}, x).graph
    with pytest.raises(UnsupportedError, match="Site 'elsewhere': its weight feeds nothing"):
        site_node(graph, "elsewhere")


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.register_buffer("table", torch.ones(5), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.table


def test_a_buffer_that_no_artifact_holds_is_named():
    model = Buffered()
    with pytest.raises(UnsupportedError, match="The model reads 'table', which no artifact holds"):
        drafted(model, {"layer": site_of(model.layer)}, torch.randn(3, 5).half())


def test_cut_at_its_sites_a_model_gives_each_site_s_codes_and_output_alone(artifact):
    inputs = tiny_inputs("unet2d", 2)
    draft = drafted_artifact(artifact, program_of("unet2d"))
    records = Reference(artifact).record(inputs)
    placeholders = cut_at_layers(draft)
    inputs_of_sites = {placeholder: records[name].x.half() for name, placeholder in placeholders.items()}
    codes, outputs = draft.module()(inputs["timestep"], *inputs_of_sites.values())
    assert set(codes) == set(outputs) == set(artifact.sites)
    assert len(inputs_of_sites) < len(artifact.sites)  # q, k and v share one input
    again = Reference(artifact).at_sites({name: record.x.half().float() for name, record in records.items()}, inputs["timestep"])
    for name, record in again.items():
        assert (outputs[name].float() - record.y).abs().max() <= 2**-11 * record.y.abs().max(), name

import pytest
import torch
from torch import nn

from edm_deploy.network.restructure import NetworkRewrite, restructure
from engines.torch_graph import fusions
from tests.conftest import artifact_by_hand, tiny_inputs
from tests.engines.rewritten import calls, drafted, drafted_artifact, program_of, site_of

TIMESTEPS = torch.tensor([100.0, 900.0])


class Block(nn.Module):
    """norm -> SiLU -> conv -> norm -> SiLU -> conv, and the input added: a residual block without its embedding."""

    def __init__(self, extra: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.conv1 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, 8, affine=False), nn.Conv2d(8, 8, 3, padding=1)
        self.extra = extra

    def forward(self, x):
        h = nn.functional.silu(self.norm1(x))
        y = self.conv1(h)
        if self.extra == "h":
            y = y + h.mean()
        z = self.conv2(nn.functional.silu(self.norm2(y)))
        match self.extra:
            case "z":
                return x + z, z
            case "broadcast":
                return z + x[:, :, :1]
            case "alpha":
                return torch.add(x, z, alpha=2.0)
            case _:
                return x + z


def both(extra=""):
    """The block's draft unfused and fused, and an input."""
    model, x = Block(extra), torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    sites = {"conv1": site_of(model.conv1), "conv2": site_of(model.conv2)}
    plain, fused = (drafted(model, sites, x) for _ in range(2))
    fusions.fuse(fused)
    return plain, fused, x


def test_a_residual_block_becomes_two_statistics_two_quantizes_and_two_convolutions():
    plain, fused, x = both()
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    counts = {
        name: calls(fused.graph, name) for name in ("group_stats", "quantize_normed", "conv2d", "group_norm", "silu", "quantize", "add")
    }
    assert counts == {"group_stats": 2, "quantize_normed": 2, "conv2d": 2, "group_norm": 0, "silu": 0, "quantize": 0, "add": 0}
    # One code in a few hundred falls the other way: the unfused values were rounded to float16 three times on the way.
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def test_a_float_branch_is_added_in_the_epilogue_of_its_layer():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1)}), torch.randn(2, 8, 4, 4).half()
    restructure(model, NetworkRewrite(branches={"conv": 2}))
    model["conv"].branch.set_weights(torch.randn(2, 72), torch.randn(8, 2))
    model.forward = model["conv"].forward
    site = site_of(model["conv"].base)
    plain, fused = (drafted(model, {"conv.base": site}, x) for _ in range(2))
    fusions.fuse(fused)
    assert (calls(plain.graph, "add"), calls(fused.graph, "add")) == (1, 0)
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-2)  # rounded to float16 once instead of twice


def test_fused_codes_are_those_of_the_same_arithmetic_in_float32():
    _, fused, x = both()
    norm = Block().norm1.float()
    node = fused.codes["conv1"]
    fused.graph.output_node().args = (node,)
    codes = fused.module()(x, TIMESTEPS)
    values = nn.functional.silu(norm(x.float()))
    site = site_of(Block().conv1)
    scaled = values * site.activation.inv_scale[torch.tensor([0, 1])][:, None, None, None]
    expected = scaled.round().clamp(-4, 11)
    from edm_deploy.numerics.kernel_layout import unpack_codes

    found = unpack_codes(codes, 4, unsigned=True, channels=8).permute(0, 3, 1, 2) - 4
    tie = (scaled - scaled.floor() - 0.5).abs() < 1e-4
    assert bool(((found == expected) | tie).all())


def test_what_others_read_is_not_fused_away():
    _, fused, x = both("h")
    assert calls(fused.graph, "silu") == 1  # read by mean() too
    assert calls(fused.graph, "quantize") == 1
    assert fused.module()(x, TIMESTEPS)[0].isfinite().all()


@pytest.mark.parametrize("extra", ["z", "broadcast", "alpha"])
def test_only_a_plain_sum_of_equal_shapes_with_one_reader_enters_the_epilogue(extra):
    plain, fused, x = both(extra)
    assert calls(fused.graph, "add") == 1
    for expected, found in zip(plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS), strict=True):
        assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()


class Attention(nn.Module):
    """The norm of diffusers' attention: [B, L, C] turned to [B, C, L] and back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.q, self.k = nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x + self.q(h) * self.k(h)


def test_a_norm_between_two_transposes_is_fused():
    model, x = Attention(), torch.randn(2, 6, 8).half()
    sites = {"q": site_of(model.q), "k": site_of(model.k)}
    plain, fused = (drafted(model, sites, x) for _ in range(2))
    fusions.fuse(fused)
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    assert [calls(fused.graph, name) for name in ("group_norm", "quantize_normed", "transpose")] == [0, 1, 0]
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def test_a_whole_model_keeps_its_output():
    artifact, inputs = artifact_by_hand(weight_bits=8, act_bits=8), tiny_inputs("unet2d", 2)
    plain, fused = (drafted_artifact(artifact, program_of("unet2d")) for _ in range(2))
    fusions.fuse(fused)
    (expected,), (found,) = plain.module()(*inputs.values()), fused.module()(*inputs.values())
    assert calls(fused.graph, "group_norm") == 0
    assert calls(fused.graph, "silu") == 0
    assert (found - expected).norm() < 0.05 * expected.norm()  # W8A8: the artifact itself is 3.6 % from its float model


@pytest.mark.parametrize(
    "kind", ["dit", *(pytest.param(kind, marks=pytest.mark.extended) for kind in ("unet2d-condition", "sdxl", "pixart", "sd3", "flux"))]
)
def test_between_the_products_of_each_architecture_no_activation_norm_gate_or_bias_is_left(kind):
    artifact, inputs = artifact_by_hand(kind, weight_bits=8, act_bits=8), tiny_inputs(kind, 2)
    plain, fused = (drafted_artifact(artifact, program_of(kind)) for _ in range(2))
    fusions.fuse(fused)
    (expected,), (found,) = plain.module()(*inputs.values()), fused.module()(*inputs.values())
    assert (found - expected).norm() < 0.05 * expected.norm()  # W8A8: the artifacts themselves are a few percent from their float models
    gone = ("silu", "gelu", "layer_norm", "group_norm", "clip", "neg", "stack", "chunk" if kind in ("unet2d-condition", "sdxl") else "silu")
    assert {name: calls(fused.graph, name) for name in gone} == dict.fromkeys(gone, 0)
    # A sum or product that is left reads no layer's output: only conditioning, positions, and SD3's RMSNorm, which is written out.
    for node in fused.graph.nodes:
        if getattr(node.target, "__name__", "") in ("add.Tensor", "mul.Tensor") and kind != "sd3":
            assert not any("conv2d" in source.name or "linear" in source.name for source in node.all_input_nodes), node.format_node()


class TokensOfAMap(nn.Module):
    """The frame of SDXL's transformers: a norm of a map, projected as tokens; projected tokens, added to the map."""

    def __init__(self, *, read_twice: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.proj_in, self.proj_out = nn.GroupNorm(2, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.read_twice = read_twice

    def forward(self, x):
        batch, channels, height, width = x.shape
        h = self.norm(x)
        y = self.proj_in(h.permute(0, 2, 3, 1).reshape(batch, height * width, channels))
        y = self.proj_out(y).reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous() + x
        return y + h.mean() if self.read_twice else y


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_norm_and_residual_of_a_map_are_fused_with_the_layers_of_its_tokens(memory_format):
    model, x = TokensOfAMap(), torch.randn(2, 8, 4, 3).half().to(memory_format=memory_format)
    sites = {"proj_in": site_of(model.proj_in), "proj_out": site_of(model.proj_out)}
    plain, fused = (drafted(model, sites, x) for _ in range(2))
    fusions.fuse(fused)
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    counts = {name: calls(fused.graph, name) for name in ("group_norm", "quantize_normed", "quantize", "add", "contiguous")}
    assert counts == {"group_norm": 0, "quantize_normed": 1, "quantize": 1, "add": 0, "contiguous": 0}
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()
    # The codes are the same tensor as those of the unfused graph.
    plain.graph.output_node().args, fused.graph.output_node().args = (plain.codes["proj_in"],), (fused.codes["proj_in"],)
    codes, expected_codes = fused.module()(x, TIMESTEPS), plain.module()(x, TIMESTEPS)
    assert codes.shape == expected_codes.shape == (2, 12, 1, 16)
    assert (codes != expected_codes).float().mean() < 0.1  # a code in a hundred falls the other way: the norm is not rounded to float16


def test_a_norm_of_a_map_that_others_read_stays():
    model, x = TokensOfAMap(read_twice=True), torch.randn(2, 8, 4, 4).half()
    fused = drafted(model, {"proj_in": site_of(model.proj_in), "proj_out": site_of(model.proj_out)}, x)
    fusions.fuse(fused)
    assert calls(fused.graph, "group_norm") == 1
    assert fused.module()(x, TIMESTEPS)[0].isfinite().all()

"""Activations and norms in front of a quantizer: what is fused, what is not, and that the codes are those of the same arithmetic in float32."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edm_deploy.numerics.kernel_layout import unpack_codes
from engines.torch_graph import fusions
from tests.engines.rewritten import ROW_OF_TIMESTEP, calls, drafted, site_of

TIMESTEPS = torch.tensor([100.0, 900.0])  # one sample at each of the table's two rows
LOW, BITS = -4, 4


class FeedForward(nn.Module):
    """up -> activation -> down, as diffusers' GEGLU and GELU; `also_read` gives the activation a second reader."""

    def __init__(self, activation: str, *, also_read: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.activation, self.also_read = activation, also_read
        self.up, self.down = nn.Linear(8, 48), nn.Linear(24 if "geglu" in activation else 48, 8)

    def forward(self, x):
        y = self.up(x)
        match self.activation:
            case "geglu":
                values, gates = y.chunk(2, dim=-1)
                h = values * functional.gelu(gates)
            case "geglu, gates first":
                gates, values = y.chunk(2, dim=-1)
                h = values * functional.gelu(gates)
            case "geglu by tanh":
                values, gates = y.chunk(2, dim=-1)
                h = values * functional.gelu(gates, approximate="tanh")
            case "gelu":
                h = functional.gelu(y)
            case "gelu_tanh":
                h = functional.gelu(y, approximate="tanh")
        return self.down(h) + h.mean() if self.also_read else self.down(h)


def both(model: nn.Module, x: torch.Tensor, *names: str, scale: float = 0.2):
    """A model's draft unfused and fused."""
    sites = {name: site_of(getattr(model, name), low=LOW, scale=scale) for name in names}
    plain, fused = (drafted(model, sites, x) for _ in range(2))
    fusions.fuse(fused)
    return plain, fused


def integers(rewritten, site: str, x: torch.Tensor, channels: int) -> torch.Tensor:
    """The codes of a site's input as numbers, [B, L, C]. The graph is cut there."""
    rewritten.graph.output_node().args = (rewritten.codes[site],)
    codes = rewritten.module()(x, TIMESTEPS)
    return unpack_codes(codes, BITS, unsigned=True, channels=channels)[:, :, 0].int() + LOW


def assert_codes(found: torch.Tensor, exact: torch.Tensor, scale: float = 0.2) -> None:
    """Those of `exact`, float64 [B, L, C], apart from rounding ties: float32 differs from it in the last bits."""
    scaled = exact / torch.tensor([scale, 2 * scale], dtype=torch.float64)[:, None, None]
    expected = scaled.round().clamp(LOW, LOW + 15)
    off = found != expected
    assert bool(((scaled - scaled.floor() - 0.5).abs() < 1e-4)[off].all())
    assert off.sum() <= 2 and (found != found.flatten()[0]).any()


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu_tanh"])
def test_the_activation_of_a_feed_forward_layer_moves_into_its_quantizer(activation):
    model, x = FeedForward(activation), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).half()
    plain, fused = both(model, x, "up", "down")
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    assert [calls(plain.graph, name) for name in ("gelu", "quantize")] == [1, 2]
    assert [calls(fused.graph, name) for name in ("gelu", "mul", "chunk", "quantize")] == [0, 0, 0, 2]
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()  # a code falls the other way: unrounded before


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu_tanh"])
def test_codes_behind_an_activation_are_those_of_float32(activation):
    model, x = FeedForward(activation), torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(1)).half() * 2
    model.up = nn.Identity()
    _, fused = both(model, x, "down")
    values = x.double()
    if activation == "geglu":
        values = values[..., :24] * functional.gelu(values[..., 24:])
    else:
        values = functional.gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")
    assert_codes(integers(fused, "down", x, values.shape[-1]), values)
    assert ROW_OF_TIMESTEP[TIMESTEPS.long()].tolist() == [0, 1]


@pytest.mark.parametrize("activation", ["geglu, gates first", "geglu by tanh"])
def test_what_no_kernel_gates_stays_a_product_of_torch(activation):
    model, x = FeedForward(activation), torch.randn(2, 6, 8).half()
    plain, fused = both(model, x, "up", "down")
    assert [calls(fused.graph, name) for name in ("gelu", "mul")] == [1, 1]
    assert torch.equal(plain.module()(x, TIMESTEPS)[0], fused.module()(x, TIMESTEPS)[0])


@pytest.mark.parametrize("activation", ["geglu", "gelu"])
def test_an_activation_with_another_reader_stays(activation):
    model, x = FeedForward(activation, also_read=True), torch.randn(2, 6, 8).half()
    plain, fused = both(model, x, "up", "down")
    assert calls(fused.graph, "gelu") == 1
    assert torch.equal(plain.module()(x, TIMESTEPS)[0], fused.module()(x, TIMESTEPS)[0])


class SingleBlock(nn.Module):
    """The end of FLUX's single block: attention's tokens and the activated MLP, side by side, projected; `first` channels before the others."""

    def __init__(self, first: int):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.mlp, self.out = nn.Linear(8, first), nn.Linear(8, 48), nn.Linear(first + 48, 8)

    def forward(self, x):
        return self.out(torch.cat([self.attention(x), functional.gelu(self.mlp(x), approximate="tanh")], dim=2))


@pytest.mark.parametrize(("first", "fused_cat"), [(64, True), (40, False)])
def test_parts_that_are_whole_chunks_are_quantized_before_they_are_concatenated(first, fused_cat):
    """32 codes of 4 bits are a chunk of 16 bytes: 64 channels are two, 40 are none."""
    model, x = SingleBlock(first), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).half()
    plain, fused = both(model, x, "attention", "mlp", "out")
    assert [calls(fused.graph, name) for name in ("gelu", "quantize", "cat")] == ([0, 3, 1] if fused_cat else [1, 2, 1])
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()
    before, after = (integers(draft, "out", x, first + 48) for draft in (plain, fused))
    assert torch.equal(before[..., :first], after[..., :first])
    assert (before != after).float().mean() < 0.02  # behind a GELU that is not rounded to float16

"""Norms of tokens in front of a quantizer: LayerNorm, adaLN as diffusers writes it, RMSNorm."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.engines.rewritten import calls
from tests.engines.torch_graph.fusions.test_prologues import TIMESTEPS, assert_codes, both, integers


class Block(nn.Module):
    """A norm of tokens and the layers that read it. x is [B, L, 3C]: tokens, and in the first of them each sample's scale and shift."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.q, self.k = kind, nn.Linear(16, 8), nn.Linear(16, 8)
        self.norm = nn.RMSNorm(16, eps=1e-6) if kind == "rms" else nn.LayerNorm(16, eps=1e-6, elementwise_affine=kind == "affine")
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.normal_()

    def forward(self, x):
        x, scale, shift = x.chunk(3, dim=-1)
        scale, shift = scale[:, 0], shift[:, 0]
        y = self.norm(x)
        match self.kind:
            case "ada":
                y = y * (1 + scale[:, None]) + shift[:, None]
            case "ada continuous":
                y = y * (1 + scale)[:, None, :] + shift[:, None, :]
            case "ada twice":
                return self.q(y * (1 + scale[:, None]) + shift[:, None]) + self.k(y * (shift[:, None] + 1) + scale[:, None])
            case "per token":
                y = y * (1 + x) + shift[:, None]
            case "no one":
                y = y * scale[:, None] + shift[:, None]
            case "read twice":
                return self.q(y) + self.k(y) + y.mean()
        return self.q(y) + self.k(y)


def normed(kind: str, model: Block, x: torch.Tensor) -> torch.Tensor:
    """What q reads, in float64."""
    x, scale, shift = x.double().chunk(3, dim=-1)
    scale, shift = scale[:, :1], shift[:, :1]
    if kind == "rms":
        return functional.rms_norm(x, (16,), model.norm.weight.double(), 1e-6)
    if kind == "affine":
        return functional.layer_norm(x, (16,), model.norm.weight.double(), model.norm.bias.double(), 1e-6)
    y = functional.layer_norm(x, (16,), eps=1e-6)
    return y * (1 + scale) + shift if kind.startswith("ada") else y


def input_of(seed: int = 0) -> torch.Tensor:
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(seed)).half()
    x[..., :16] += 30  # far from 0, where a variance about 0 would be lost
    return x


@pytest.mark.parametrize("kind", ["plain", "affine", "rms", "ada", "ada continuous", "ada twice"])
def test_a_norm_of_tokens_and_its_quantizer_become_one_kernel(kind):
    model, x = Block(kind), input_of()
    plain, fused = both(model, x, "q", "k")
    counts = {name: calls(fused.graph, name) for name in ("layer_norm", "rms_norm", "quantize", "quantize_row_normed", "unsqueeze")}
    kernels = 2 if kind == "ada twice" else 1
    assert counts == {"layer_norm": 0, "rms_norm": 0, "quantize": 0, "quantize_row_normed": kernels, "unsqueeze": 0}
    assert [calls(fused.graph, name) for name in ("mul", "add")] == [0, 0]
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()
    assert_codes(integers(fused, "q", x, 16), normed(kind, model.double(), x))


@pytest.mark.parametrize("kind", ["per token", "no one", "read twice"])
def test_another_scale_or_reader_keeps_the_norm_in_torch(kind):
    plain, fused = both(Block(kind), x := input_of(), "q", "k")
    assert [calls(fused.graph, name) for name in ("layer_norm", "quantize_row_normed")] == [1, 0]
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=4e-3)  # q + k is rounded to float16 once instead of twice


def test_a_norm_wider_than_the_kernel_stays():
    model, x = nn.Sequential(nn.LayerNorm(8200), nn.Linear(8200, 8)), torch.randn(2, 1, 8200).half()
    _, fused = both(model, x, "1")
    assert [calls(fused.graph, name) for name in ("layer_norm", "quantize_row_normed")] == [1, 0]

"""What follows a layer and enters its epilogue: a bias and a gate for each sample, the residual behind them, a clip."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.engines.rewritten import calls
from tests.engines.torch_graph.fusions.test_prologues import TIMESTEPS, both

ADDED = ("add", "mul", "clip", "clamp", "unsqueeze")


class ResNet(nn.Module):
    """conv -> + time embedding -> norm -> conv, the embedding from a linear of the map's mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out, self.time, self.norm = (
            nn.Conv2d(8, 16, 3, padding=1),
            nn.Conv2d(16, 8, 1),
            nn.Linear(8, 16),
            nn.GroupNorm(2, 16),
        )

    def forward(self, x):
        embedding = self.time(x.mean(dim=(2, 3)))
        return x + self.out(functional.silu(self.norm(self.conv(x) + embedding[:, :, None, None])))


class Gated(nn.Module):
    """residual + gate * layer, as diffusers' transformers write it, and variations. x is [B, L, 8]; gates are of its first token."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.layer = kind, nn.Linear(8, 8)

    def forward(self, x):
        shift, gate = x[:, 0] * 0.5, x[:, 1]
        y = self.layer(x)
        match self.kind:
            case "dit":
                return gate.unsqueeze(1) * y + x
            case "flux":
                return (x + gate.unsqueeze(1) * y).clip(-65504, 65504)
            case "all":
                return ((y + shift[:, None]) * gate[:, None] + x).clamp(-65504, 65504)
            case "gate alone":
                return y * gate[:, None, :]
            case "bias behind the gate":
                return y * gate[:, None] + shift[:, None]
            case "gate behind the residual":
                return (y + x) * gate[:, None]
            case "residual behind the clip":
                return y.clip(-65504, 65504) + x
            case "another clip":
                return y.clip(-1, 1)
            case "gate of each token":
                return y * x[..., :1]
            case "read twice":
                return y * gate[:, None] + y


def outputs(model: nn.Module, x: torch.Tensor, *sites: str) -> tuple[torch.fx.Graph, torch.Tensor, torch.Tensor]:
    plain, fused = both(model, x, *sites)
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    assert found.shape == expected.shape
    return fused.graph, expected.float(), found.float()


def test_a_time_embedding_is_a_bias_of_each_sample():
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    graph, expected, found = outputs(ResNet(), x, "conv", "out", "time")
    assert {name: calls(graph, name) for name in (*ADDED, "group_norm")} == dict.fromkeys((*ADDED, "group_norm"), 0)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("dit", {}),
        ("flux", {}),
        ("all", {}),
        ("gate alone", {}),
        ("bias behind the gate", {"add": 1, "unsqueeze": 1}),
        ("gate behind the residual", {"mul": 1, "unsqueeze": 1}),
        ("residual behind the clip", {"add": 1}),
        ("another clip", {"clip": 1}),
        ("gate of each token", {"mul": 1}),
        ("read twice", {"add": 1, "mul": 1, "unsqueeze": 1}),
    ],
)
def test_operands_enter_in_the_order_of_the_kernels_only(kind, left):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).half()
    graph, expected, found = outputs(Gated(kind), x, "layer")
    counts = {name: calls(graph, name) for name in ADDED} | {"mul": calls(graph, "mul") - (kind in ("all", "bias behind the gate"))}
    assert counts == dict.fromkeys(ADDED, 0) | left  # the halving of the shift apart
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=4e-3)  # rounded to float16 once instead of each time


def test_a_sum_beyond_float16_is_clipped_as_in_torch():
    x = torch.full((2, 5, 8), 6e4).half()
    x[:, 1] = 1.0  # the gate
    model = Gated("flux")
    nn.init.constant_(model.layer.bias, 3e4)
    _, expected, found = outputs(model, x, "layer")
    assert found[:, 2:].unique().tolist() == expected[:, 2:].unique().tolist() == [65504.0]
    assert found[:, 1].abs().max() < 4e4

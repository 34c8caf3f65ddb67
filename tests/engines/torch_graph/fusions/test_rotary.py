"""FLUX's rotary position embedding, as diffusers computes it."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from engines.torch_graph import fusions
from tests.engines.rewritten import calls, drafted
from tests.engines.torch_graph.fusions.test_prologues import TIMESTEPS


class Rotated(nn.Module):
    """Two tensors turned by the same angles, which are computed from the input as the model does."""

    def __init__(self, width: int, unbind: int = -1):
        super().__init__()
        self.width, self.unbind = width, unbind

    def forward(self, x):
        x = x.unflatten(-1, (-1, self.width))
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1.0, self.width)
        rotary = (angles.cos(), angles.sin())
        turned = [apply_rotary_emb(each, rotary, use_real_unbind_dim=self.unbind, sequence_dim=1) for each in (x, x * 2)]
        return torch.cat(turned, 1)


def both(model: nn.Module, x: torch.Tensor):
    plain, fused = (drafted(model, {}, x) for _ in range(2))
    fusions.fuse(fused)
    return fused.graph, plain.module()(x, TIMESTEPS)[0], fused.module()(x, TIMESTEPS)[0]


def test_a_rotation_is_one_kernel_with_the_same_bits():
    graph, expected, found = both(Rotated(16), torch.randn(2, 5, 48).half())
    assert [calls(graph, name) for name in ("rotary", "neg", "stack", "unbind")] == [2, 0, 0, 0]
    assert [calls(graph, name) for name in ("cos", "sin", "squeeze")] == [1, 1, 2]  # shared
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("width", "unbind"), [(12, -1), (16, -2)])
def test_what_the_kernel_does_not_turn_stays(width, unbind):
    """Heads that are no octets; pairs of a channel and the one half a head further."""
    graph, expected, found = both(Rotated(width, unbind), torch.randn(2, 5, 48).half())
    assert calls(graph, "rotary") == 0
    assert torch.equal(found, expected)

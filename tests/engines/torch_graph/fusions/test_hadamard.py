"""Rotations that quantizers compute: what is fused, and that the codes are those of the product with the matrix."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edm_deploy.network.restructure import NetworkRewrite, restructure
from edm_deploy.network.rotation import hadamard, prepare, rotate
from engines.torch_graph import fusions
from tests.engines.rewritten import calls, drafted, site_of
from tests.engines.torch_graph.fusions.test_prologues import TIMESTEPS, assert_codes, integers


class Rotated(nn.Module):
    """A layer behind what may precede its rotation; x is [B, L, 64]."""

    def __init__(self, before: str, block: int):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.norm = before, nn.LayerNorm(64)
        self.layer = nn.Linear(32 if before == "geglu" else 64, 16)
        restructure(self, NetworkRewrite(rotated={"layer": block}))

    def value(self, x):
        match self.before:
            case "norm":
                return self.norm(x)
            case "silu":
                return functional.silu(x)
            case "geglu":
                values, gates = x.chunk(2, dim=-1)
                return values * functional.gelu(gates)
            case "concatenation":
                return torch.cat([x[..., :32] * 2, functional.gelu(x[..., 32:])], -1)
            case _:
                return x

    def forward(self, x):
        return self.layer(self.value(x))


def both(model: nn.Module, x: torch.Tensor):
    plain, fused = (drafted(model, {"layer": site_of(model.layer)}, x) for _ in range(2))
    fusions.fuse(fused)
    return plain, fused


def tokens() -> torch.Tensor:
    return torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize("block", [2, 8, 32])
@pytest.mark.parametrize("before", ["nothing", "norm", "silu", "geglu", "concatenation"])
def test_a_rotation_and_what_precedes_it_are_computed_while_quantizing(before, block):
    model, x = Rotated(before, block), tokens()
    plain, fused = both(model, x)
    assert calls(plain.graph, "matmul") == 1
    left = {name: calls(fused.graph, name) for name in ("matmul", "layer_norm", "silu", "gelu", "unflatten")}
    assert left == dict.fromkeys(left, 0)
    exact = rotate(model.double().value(x.double()), block)
    assert_codes(integers(fused, "layer", x, exact.shape[-1]), exact.detach())


def test_other_products_and_larger_blocks_stay():
    class Other(nn.Module):
        def __init__(self, matrix):
            super().__init__()
            self.layer = nn.Linear(len(matrix), 16)
            self.register_buffer("matrix", matrix.half())

        def forward(self, x):
            return self.layer(x @ self.matrix)

    torch.manual_seed(0)
    wrong = hadamard(64).clone()
    wrong[3, 5] *= -1
    prepare(512)
    for matrix in (torch.randn(64, 64), wrong, hadamard(512)):
        x = torch.randn(2, 3, len(matrix)).half()
        model = Other(matrix)
        traced = drafted(model, {"layer": site_of(model.layer)}, x)
        fusions.fuse(traced)
        assert calls(traced.graph, "matmul") == 1


def test_a_rotation_that_others_read_stays():
    class Both(Rotated):
        def forward(self, x):
            h = rotate(self.value(x), 64)
            return self.plain(h) + h.mean()

    torch.manual_seed(0)
    model = Both("nothing", 64)
    model.plain = nn.Linear(64, 16)
    traced = drafted(model, {"plain": site_of(model.plain)}, tokens())
    fusions.fuse(traced)
    assert calls(traced.graph, "matmul") == 1
    assert traced.module()(tokens(), TIMESTEPS)[0].isfinite().all()

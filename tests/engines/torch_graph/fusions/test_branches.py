"""Low-rank branches in the kernels of their layers: what is fused, what is not, and that the result stays that of the products in torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edm_deploy.network.adapter_inputs import AdapterInputs
from edm_deploy.network.restructure import NetworkRewrite, restructure
from engines.torch_graph import fusions
from engines.torch_graph.adapters import add_adapters
from tests.engines.rewritten import calls, drafted, site_of
from tests.engines.torch_graph.fusions.test_prologues import TIMESTEPS

GRAPH = ("linear", "conv2d", "add", "quantize", "quantize_branch", "matmul", "layer_norm", "gelu", "mul")


class Tokens(nn.Module):
    """norm -> q, k -> product -> GELU -> down, and the input added; x is [B, L, 32]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.q, self.k, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(functional.gelu(self.q(h) * self.k(h)))


class Map(nn.Module):
    """A convolution and its residual; x is [B, 32, 4, 4]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        return x + self.conv(functional.silu(x))


def both(model: nn.Module, x: torch.Tensor, structure: NetworkRewrite, *, adapters: int | None = None):
    """The draft of a restructured model with random branches and pre-scales: unfused, and with all fusions; with inputs of LoRAs of a rank."""
    restructure(model, structure)
    generator = torch.Generator().manual_seed(1)
    for _, part in model.named_modules():
        if (branch := getattr(part, "branch", None)) is not None:
            down, up = (torch.randn(weight.flatten(1).shape, generator=generator) for weight in (branch.down.weight, branch.up.weight))
            branch.set_weights(down / 8, up / 8)
        if hasattr(part, "pre_scale"):
            part.pre_scale.data = torch.rand(len(part.pre_scale), generator=generator) + 0.5
    sites = {
        name: site_of(part) for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d) and ".branch." not in name
    }
    plain, fused = (drafted(model, sites, x) for _ in range(2))
    for rewritten in (plain, fused) if adapters else ():
        layers = {name: model.get_submodule(name) for name in sites}
        add_adapters(rewritten, layers, AdapterInputs(adapters, {name: tuple(layer.weight.shape) for name, layer in layers.items()}))
    fusions.fuse(fused, branches=True)
    return plain, fused


def kernels_of(graph: torch.fx.Graph) -> dict[str, int]:
    """Calls by operator, those of torch and of the kernels by one name apart."""
    found = {name: calls(graph, name) for name in GRAPH}
    ours = sum("edm_deploy" in str(node.target) and "linear" in str(node.target) for node in graph.nodes)
    return {name: count for name, count in (found | {"linear": found["linear"] - ours}).items() if count and name != "conv2d"}


def assert_alike(plain, fused, x: torch.Tensor, tolerance: float = 0.05) -> None:
    """Values between were rounded to float16 in one of them only, so that a code of 4 bits in a few hundred falls the other way."""
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).norm() < tolerance * (expected.float() - x.float()).norm()


def tokens() -> torch.Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).half()


def test_both_products_enter_the_kernels_with_norm_and_activation():
    """Two layers share one quantizer, which multiplies by both first matrices at once: no operator of torch is left but the product of q and k."""
    plain, fused = both(Tokens(), tokens(), NetworkRewrite(branches={"q": 8, "k": 16, "down": 8}))
    assert kernels_of(plain.graph) == {"linear": 6, "add": 4, "quantize": 2, "layer_norm": 1, "gelu": 1, "mul": 1}
    assert kernels_of(fused.graph) == {"quantize_branch": 2, "mul": 1}
    assert_alike(plain, fused, tokens())


def test_a_rank_that_is_no_multiple_of_eight_is_filled_up_with_zeros():
    plain, fused = both(Tokens(), tokens(), NetworkRewrite(branches={"q": 3, "down": 13}))
    assert kernels_of(fused.graph) == {"quantize_branch": 2, "mul": 1}
    assert_alike(plain, fused, tokens())


def test_a_rotated_layer_has_a_branch_of_what_is_not_rotated():
    structure = NetworkRewrite(branches={"q": 8, "down": 8}, rotated={"q.base": 32, "k": 32, "down.base": 64})
    plain, fused = both(Tokens(), tokens(), structure)
    assert kernels_of(plain.graph)["matmul"] == 2
    assert kernels_of(fused.graph) == {"quantize_branch": 2, "mul": 1}
    assert_alike(
        plain, fused, tokens(), tolerance=0.25
    )  # without the branches it is 0.14, too: two rotations are rounded in one of the graphs


@pytest.mark.parametrize("rotated", [{}, {"down.base": 64}])
def test_a_branch_beside_a_pre_scale_has_it_divided_out_of_its_matrix(rotated):
    plain, fused = both(Tokens(), tokens(), NetworkRewrite(branches={"down": 8}, pre_scaled=("down.base",), rotated=rotated))
    assert kernels_of(fused.graph) == {"quantize_branch": 1, "gelu": 1, "mul": 2}  # q and k: one quantize_row_normed
    assert_alike(plain, fused, tokens(), tolerance=0.25 if rotated else 0.05)


def test_of_a_convolution_the_second_product_is_fused_and_the_first_stays():
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    plain, fused = both(Map(), x, NetworkRewrite(branches={"conv": 5}))
    ours = [node for node in fused.graph.nodes if "edm_deploy.conv2d" in str(node.target)]
    torchs = [node for node in fused.graph.nodes if "aten.conv2d" in str(node.target)]
    assert (len(ours), len(torchs), kernels_of(fused.graph).get("add")) == (1, 1, None)
    assert_alike(plain, fused, x)


def test_a_rank_larger_than_the_kernels_stays_a_product_of_torch():
    model = nn.ModuleDict({"a": nn.Linear(512, 512)})
    model.forward = lambda x: model["a"](x)
    x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0)).half()
    plain, fused = both(model, x, NetworkRewrite(branches={"a": 264}))
    assert kernels_of(fused.graph) == {"linear": 2, "quantize": 1}  # the sum is the residual
    assert_alike(plain, fused, x)


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (NetworkRewrite(), {"quantize_branch": 2, "mul": 1}),
        (NetworkRewrite(branches={"q": 8, "down": 3}), {"quantize_branch": 2, "mul": 1}),
        (NetworkRewrite(rotated={"q": 32, "k": 32, "down": 64}), {"quantize_branch": 2, "mul": 1}),
        (NetworkRewrite(branches={"q": 8, "down": 3}, rotated={"q.base": 32, "k": 32, "down.base": 64}), {"quantize_branch": 2, "mul": 1}),
        (
            NetworkRewrite(branches={"q": 8, "down": 8}, pre_scaled=("down.base",), rotated={"down.base": 64}),
            {"quantize_branch": 2, "gelu": 1, "mul": 2},
        ),
    ],
)
def test_a_lora_enters_the_same_kernels_beside_a_branch_or_behind_a_rotation(structure, expected):
    """Each sample has its own weights of the slots. A LoRA reads what its layer reads, behind a rotation."""
    model, x = Tokens(), tokens()
    plain, fused = both(model, x, structure, adapters=8)
    assert kernels_of(fused.graph) == expected
    fused.graph.lint()
    ranges = [node for node in fused.graph.nodes if "aten.cat" in str(node.target) and "slice" in str(node.args[0])]
    assert ranges == [], "a layer's columns lie side by side"
    assert all(node.graph is fused.graph and node in set(fused.graph.nodes) for node in fused.products.values())
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(node.meta["val"].shape, generator=generator).half() / 6 for node in lora_weights(fused.graph)]
    slots = torch.tensor([[0.5] * 8, [1.0] * 4 + [0.0] * 4]).half()
    without, expected_y, found = (
        graph.module()(x, TIMESTEPS, slots * scale, *weights)[0].float() for graph, scale in ((plain, 0), (plain, 1), (fused, 1))
    )
    assert (found - expected_y).norm() < 0.25 * (expected_y - without).norm()


def lora_weights(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder" and node.name.startswith("lora_") and "val" in node.meta]


class Other(nn.Module):
    """A layer, and a sum with what looks like a branch: a grouped 1x1 convolution, or one behind a depthwise convolution."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.conv, self.depthwise = kind, nn.Conv2d(12, 32, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.pointwise = nn.Conv2d(12, 32, 1, groups=4 if kind == "grouped" else 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.pointwise(x if self.kind == "grouped" else self.depthwise(x))


@pytest.mark.parametrize("kind", ["grouped", "depthwise"])
def test_convolutions_of_groups_are_no_branch(kind):
    model, x = Other(kind), torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    plain, fused = (drafted(model, {"conv": site_of(model.conv)}, x) for _ in range(2))
    fusions.fuse(fused, branches=True)
    (expected,), (found,) = plain.module()(x, TIMESTEPS), fused.module()(x, TIMESTEPS)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_a_matrix_that_a_tiny_pre_scale_would_make_infinite_stays_in_torch():
    model = Tokens()
    restructure(model, NetworkRewrite(branches={"down": 8}, pre_scaled=("down.base",)))
    model.down.branch.set_weights(torch.full((8, 64), 6.0), torch.full((32, 8), 0.01))
    model.down.base.pre_scale.data[3] = 6.2e-5
    sites = {name: site_of(part) for name, part in (("q", model.q), ("k", model.k), ("down.base", model.down.base))}
    fused = drafted(model, sites, tokens())
    fusions.fuse(fused, branches=True)
    assert kernels_of(fused.graph).get("quantize_branch") is None
    assert fused.module()(tokens(), TIMESTEPS)[0].isfinite().all()


class ReadTwice(nn.Module):
    """A layer whose branch's first product is read by something else too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(32, 64)

    def forward(self, x):
        return self.q(x) + self.q.branch.down(x).sum()


def test_what_others_read_too_stays():
    plain, fused = both(ReadTwice(), tokens(), NetworkRewrite(branches={"q": 8}))
    assert kernels_of(fused.graph).get("quantize_branch") is None
    (expected,), (found,) = plain.module()(tokens(), TIMESTEPS), fused.module()(tokens(), TIMESTEPS)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)

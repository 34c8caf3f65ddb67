from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from edm_deploy.artifact.fold_pre_scales import edits_of, fold_pre_scales
from edm_deploy.artifact.reference import Reference
from edm_deploy.network.restructure import NetworkRewrite, restructure
from tests.conftest import artifact_by_hand, tiny_inputs

GENERATOR = torch.Generator().manual_seed(0)


class Net(nn.Module):
    """Layers by name, and a function of them and of one input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.model = nn.ModuleDict(deepcopy(layers))  # tests share them
        self.run = forward

    def forward(self, x):
        return self.run(self.model, x)


def scale(channels):
    return 0.25 + 2 * torch.rand(channels, generator=GENERATOR)


def folded(net, x, scales, segments=None, branches=None):
    """The layers whose pre-scales `edits_of` moves; asserts that the network then computes what it computed."""
    torch.manual_seed(0)
    restructure(net.model, NetworkRewrite(segments or {}, tuple(scales), branches or {}))
    for name, parameter in net.named_parameters():
        if not name.endswith("pre_scale"):
            nn.init.normal_(parameter)
    net.eval().requires_grad_(False)
    for name, value in scales.items():
        layer = net.model.get_submodule(name)
        layer.pre_scale.copy_(value)
        layer.weight.div_(value.reshape(-1, *[1] * (layer.weight.ndim - 2)))
    before = net(x)
    program = torch.export.export(net, (x,), strict=False)
    edits, moved = edits_of(program, scales)
    state = net.state_dict()
    for name, factor in edits.items():
        state[f"model.{name}"] = state[f"model.{name}"] * factor
    for name in moved:
        state[f"model.{name}.pre_scale"] = torch.ones_like(scales[name])
    net.load_state_dict(state)
    assert (net(x) - before).abs().max() <= 1e-6 * before.abs().max()  # a few float32 roundings
    return moved


MAP, TOKENS = torch.randn(2, 8, 3, 5, generator=GENERATOR), torch.randn(2, 5, 8, generator=GENERATOR)


def test_a_linear_in_front_takes_the_scale_into_rows_and_bias():
    net = Net(lambda m, x: m["b"](m["a"](x)), a=nn.Linear(1, 2), b=nn.Linear(2, 1))
    restructure(net.model, NetworkRewrite({}, ("b",)))
    program = torch.export.export(net, (torch.ones(3, 1),), strict=False)
    edits, moved = edits_of(program, {"b": torch.tensor([2.0, 0.5])})
    assert moved == {"b"}
    assert {name: factor.tolist() for name, factor in edits.items()} == {"a.weight": [[2.0], [0.5]], "a.bias": [2.0, 0.5]}


def test_a_branch_on_the_same_input_is_divided_and_one_in_front_is_multiplied():
    net = Net(lambda m, x: m["b"](m["a"](x)), a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    assert folded(net, TOKENS, {"b.base": scale(8)}, branches={"a": 2, "b": 3}) == {"b.base"}
    net = Net(lambda m, x: m["b"](m["a"](x)), a=nn.Conv2d(8, 8, 3, padding=1), b=nn.Conv2d(8, 4, 3, padding=1))
    assert folded(net, MAP, {"b.base": scale(8)}, branches={"a": 2, "b": 3}) == {"b.base"}


def test_where_siblings_are_scaled_differently_a_branch_keeps_its_weight():
    net = Net(lambda m, x: m["q"](m["a"](x)) + m["k"](m["a"](x)), a=nn.Linear(8, 8), q=nn.Linear(8, 4), k=nn.Linear(8, 4))
    assert not folded(net, TOKENS, {"q.base": scale(8), "k": scale(8)}, branches={"q": 2})


def test_the_affine_of_a_norm_takes_what_its_readers_share():
    def qkv(m, x):
        x = m["norm"](x)
        return m["q"](x) + m["k"](x) * m["v"](x)

    def layers():
        return {"norm": nn.LayerNorm(8)} | {name: nn.Linear(8, 4) for name in "qkv"}

    same = scale(8)
    assert folded(Net(qkv, **layers()), TOKENS, dict.fromkeys("qkv", same)) == set("qkv")
    assert folded(Net(qkv, **layers()), TOKENS, {"q": same, "k": same, "v": scale(8)}) == set()
    assert folded(Net(qkv, **layers()), TOKENS, {"q": same, "k": same}) == set(), "v reads the norm as it is"


def attention(m, x):
    q, k, v = (m[name](x).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv")
    return m["out"](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, -1, 8))


def gated(m, x):
    value, gate = m["a"](x).chunk(2, dim=-1)
    return m["b"](value * functional.gelu(gate))


def adaptive(m, x):
    return m["b"](functional.layer_norm(x, (8,)) * (1 + m["a"](x)))


def rms(m, x):
    return m["b"](x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m["norm"].weight)


LINEARS, CONVOLUTIONS = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 4)}, {"a": nn.Conv2d(8, 8, 3), "b": nn.Conv2d(8, 4, 1)}


@pytest.mark.parametrize(
    ("forward", "layers", "x", "moves"),
    [
        (lambda m, x: m["b"](m["norm"](x)), {"norm": nn.GroupNorm(2, 8), "b": nn.Conv2d(8, 4, 3)}, MAP, True),
        (lambda m, x: m["b"](m["norm"](x).flatten(2).transpose(1, 2)), {"norm": nn.GroupNorm(2, 8), "b": nn.Linear(8, 4)}, MAP, True),
        (lambda m, x: m["b"](functional.silu(m["norm"](x))), {"norm": nn.GroupNorm(2, 8), "b": nn.Conv2d(8, 4, 3)}, MAP, False),
        (lambda m, x: m["b"](functional.layer_norm(x, (8,))), {"b": nn.Linear(8, 4)}, TOKENS, False),
        (lambda m, x: m["b"](m["norm"](x)), {"norm": nn.LayerNorm((5, 8)), "b": nn.Linear(8, 4)}, TOKENS, False),
        (lambda m, x: m["b"](functional.interpolate(m["a"](x), scale_factor=2.0)), CONVOLUTIONS, MAP, True),
        (lambda m, x: m["b"](x), {"b": nn.Linear(8, 4)}, TOKENS, False),
        (lambda m, x: (y := m["a"](x)).sum() + m["b"](y), LINEARS, TOKENS, False),
        (lambda m, x: m["b"](m["a"](m["a"](x))), LINEARS, TOKENS, False),
        (lambda m, x: m["b"]((y := m["a"](x)) * y), LINEARS, TOKENS, False),
        (lambda m, x: m["b"](m["a"](x) + x), LINEARS, TOKENS, False),
        (lambda m, x: m["b"](m["a"](x) + m["c"](x)), LINEARS | {"c": nn.Linear(8, 8)}, TOKENS, True),
        (lambda m, x: m["b"](torch.cat([m["a"](x), m["c"](x)], 1)), LINEARS | {"c": nn.Linear(8, 8)}, TOKENS, True),
        (
            lambda m, x: m["b"](torch.cat([m["a"](x), m["c"](x)], -1)),
            {"a": nn.Linear(8, 3), "c": nn.Linear(8, 5), "b": nn.Linear(8, 4)},
            TOKENS,
            True,
        ),
        (lambda m, x: m["b"](m["a"](x) / 3), LINEARS, TOKENS, True),
        (gated, {"a": nn.Linear(8, 16), "b": nn.Linear(8, 4)}, TOKENS, True),
        (adaptive, LINEARS, TOKENS, False),
        (rms, {"norm": nn.LayerNorm(8, bias=False), "b": nn.Linear(8, 4)}, TOKENS, True),
    ],
    ids=[
        "norm",
        "norm, then turned",
        "activation",
        "norm without affine",
        "norm over tokens too",
        "upsampled",
        "the input",
        "read twice",
        "layer used twice",
        "square",
        "residual",
        "sum",
        "tokens joined",
        "channels joined",
        "divided",
        "gate",
        "adaptive norm",
        "rms norm",
    ],
)
def test_a_scale_moves_where_that_is_exact(forward, layers, x, moves):
    assert folded(Net(forward, **layers), x, {"b": scale(8)}) == ({"b"} if moves else set())


def test_attention_carries_a_scale_to_its_values():
    layers = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}
    assert folded(Net(attention, **layers), TOKENS, {"out": scale(8)}) == {"out"}


def test_the_parts_of_a_cut_layer_are_scaled_in_one_layer_before():
    net = Net(lambda m, x: m["b"](m["a"](x)), a=nn.Conv2d(8, 8, 3), b=nn.Conv2d(8, 4, 1))
    scales = {"b.segment0": scale(3), "b.segment1": scale(5)}
    assert folded(net, MAP, scales, segments={"b": (3, 5)}) == set(scales)


def scaled_everywhere(kind, powers_of_two):
    """An artifact by hand whose every site has a pre-scale, q, k and v the same."""
    artifact = artifact_by_hand(kind)
    params = dict(artifact.params)
    for name, site in artifact.sites.items():
        parent, _, leaf = name.rpartition(".")
        torch.manual_seed(len(parent) if leaf in ("to_q", "to_k", "to_v") else len(name))
        channels = site.codes.shape[1]
        params[f"{name}.pre_scale"] = 2.0 ** torch.randint(-2, 3, (channels,)) if powers_of_two else 0.5 + torch.rand(channels)
    return replace(artifact, params=params, structure=NetworkRewrite({}, tuple(artifact.sites)))


def test_a_quantized_model_computes_the_same_bits_and_keeps_what_cannot_move():
    artifact = scaled_everywhere("unet2d-condition", powers_of_two=True)
    thinner = fold_pre_scales(artifact)
    thinner.validate()
    inputs = tiny_inputs("unet2d-condition")
    assert torch.equal(Reference(thinner)(inputs), Reference(artifact)(inputs)), "powers of two: no rounding differs"
    moved = {name.partition("down_blocks.0.attentions.0.")[2] for name in set(artifact.sites) - set(thinner.structure.pre_scaled)}
    block = "transformer_blocks.0"
    assert moved - {""} == {
        "proj_in",
        *(f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"{block}.attn2.{name}" for name in ("to_q", "to_out.0")),
        f"{block}.ff.net.0.proj",
        f"{block}.ff.net.2",
    }
    assert "conv_in" in thinner.structure.pre_scaled
    assert all(torch.equal(site.codes, artifact.sites[name].codes) for name, site in thinner.sites.items())


def test_the_float_function_stays_what_it_is():
    artifact = scaled_everywhere("dit", powers_of_two=False)
    artifact = replace(artifact, sites={name: replace(site, activation=None) for name, site in artifact.sites.items()})
    thinner = fold_pre_scales(artifact)
    assert len(thinner.structure.pre_scaled) == len(artifact.structure.pre_scaled) - 2, "each block's attention: values take their output's"
    inputs = tiny_inputs("dit")
    expected = Reference(artifact)(inputs)
    assert (Reference(thinner)(inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_without_pre_scales_the_artifact_is_returned_as_it_is(artifact_w4a4):
    assert fold_pre_scales(artifact_w4a4) is artifact_w4a4

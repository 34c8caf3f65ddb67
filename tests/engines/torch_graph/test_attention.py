import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.torch_graph.attention import LEAST_KEYS, attention_in_int8
from engines.torch_graph.rewrite import rewrite_layers
from tests.engines.rewritten import calls, drafted, program_of, site_of
from tests.engines.torch_graph.test_fusions import TIMESTEPS


class Attending(nn.Module):
    """A map's attention to itself, and then to `keys` learned tokens, as diffusers writes it: views of [B, L, H * D]."""

    def __init__(self, keys: int = 0, width: int = 8, **options):
        super().__init__()
        torch.manual_seed(0)
        self.width, self.options = width, options
        self.to_q, self.to_kv = nn.Linear(16, 2 * width), nn.Linear(16, 4 * width)
        self.text = nn.Parameter(torch.randn(1, keys, 16)) if keys else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        source = tokens if self.text is None else self.text.expand(x.shape[0], -1, -1)
        query, key, value = (self.heads(part) for part in (self.to_q(tokens), *self.to_kv(source).chunk(2, -1)))
        mask = None if not self.options.get("masked") else torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        options = {name: option for name, option in self.options.items() if name != "masked"}
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
        return y.transpose(1, 2).flatten(2)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, self.width)).transpose(1, 2)


def draft(model: nn.Module) -> tuple:
    x = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0)).half()
    return drafted(model, {"to_q": site_of(model.to_q)}, x), x


def test_attention_of_a_map_to_itself_becomes_ours():
    rewritten, x = draft(Attending(scale=0.4))
    (expected,) = rewritten.module()(x, TIMESTEPS)
    assert len(attention_in_int8(rewritten)) == 1
    assert (calls(rewritten.graph, "attention_s8"), calls(rewritten.graph, "scaled_dot_product_attention")) == (1, 0)
    (found,) = rewritten.module()(x, TIMESTEPS)
    assert found.stride() == expected.stride()  # a view of [B, L, H, D], so that no copy follows
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.02  # of 8 bits; the scale 0.4 in place of 8 ** -0.5 would be 0.05
    (alone,) = rewritten.module()(x[:1], TIMESTEPS[:1])
    torch.testing.assert_close(alone, found[:1], rtol=0, atol=2e-3)


# Self-attention at free sizes, which the trace has as symbols. Attention to a text, and with a mask, is not among them.
MODELS = [
    ("unet2d", 4),
    *(pytest.param(*case, marks=pytest.mark.extended) for case in (("dit", 2), ("pixart", 2), ("sd3", 3), ("flux", 2))),
]


@pytest.mark.parametrize(("kind", "ours"), MODELS)
def test_self_attention_of_any_size_becomes_ours(kind, ours):
    program = program_of(kind)
    params = {name.removeprefix("model."): value for name, value in program.state_dict.items()}
    rewritten = rewrite_layers(program, {}, params, torch.zeros(1000, dtype=torch.int32), torch.float16)
    assert len(attention_in_int8(rewritten)) == ours


@pytest.mark.parametrize(("keys", "ours"), [(LEAST_KEYS - 1, 0), (LEAST_KEYS, 1)])
def test_attention_to_a_text_becomes_ours_where_it_is_long(keys, ours):
    rewritten, _ = draft(Attending(keys=keys))
    assert len(attention_in_int8(rewritten)) == ours


@pytest.mark.parametrize("options", [{"masked": True}, {"is_causal": True}, {"dropout_p": 0.5}, {"width": 12}, {"width": 168}], ids=str)
def test_what_the_kernels_do_not_have_stays_torchs(options):
    rewritten, _ = draft(Attending(**options))
    assert attention_in_int8(rewritten) == []
    assert calls(rewritten.graph, "scaled_dot_product_attention") == 1


def test_another_type_than_the_graphs_stays_torchs():
    class Upcast(Attending):
        def heads(self, x: Tensor) -> Tensor:
            return super().heads(x).float()

    rewritten, _ = draft(Upcast())
    assert attention_in_int8(rewritten) == []

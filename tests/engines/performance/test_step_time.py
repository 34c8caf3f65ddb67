import tomllib

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.restructure import NetworkRewrite, restructure
from edm_deploy_tools.benchmarks.traced_step import TracedModel
from edm_deploy_tools.inspection.architectures import architecture
from engines.performance.attention_time import attention_s8_seconds, attention_seconds
from engines.performance.gpus import TABLE, gpu_named, launch_seconds
from engines.performance.roofline import Matmul, expected, others
from engines.performance.step_time import step_time
from engines.torch_graph.attention import attention_in_int8
from tests.engines.rewritten import drafted, site_of

MEASURED = tomllib.loads((TABLE.parent / "measured.toml").read_text())
GPU = gpu_named("rtx3090")
LAUNCH = launch_seconds(graph=True)


def traced(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """aten's graph of a model, on the meta device."""
    program = torch.export.export(model.half().eval(), (x.half(),), strict=False).module(check_guards=False)
    return program.to("meta")


def moved(size: float) -> float:
    return size / (GPU.l2 if size <= GPU.l2_size / 2 else GPU.dram)


class Mlp(nn.Module):
    """A product, three operations that torch.compile fuses, of which a later one reads the input again, and a product."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x):
        return self.down(functional.gelu(self.up(x)) * 2 + 1) + x


def test_every_kernel_is_counted_with_what_it_moves():
    """gelu, mul and add of [4096, 512] in float16 read and write 4 MB each; the last addition reads 2 MB twice and writes 2 MB."""
    x, row = torch.randn(4096, 256), 4096 * 2
    found = step_time(traced(Mlp(), x), [x.half().to("meta")], GPU)
    products = [others(Matmul(rows=4096, channels=a, taps=1, outputs=b), "float16", GPU).seconds for a, b in ((256, 512), (512, 256))]
    assert found.launches == 6
    assert found.by_kind()["layers"] == pytest.approx(sum(products))
    assert found.by_kind()["elementwise"] == pytest.approx(3 * moved(2 * 512 * row) + moved(3 * 256 * row) + 4 * LAUNCH)


def test_compiled_a_chain_between_products_is_read_and_written_once():
    """The addition after the second product is no part of the chain before it, although it reads the same input."""
    x, row = torch.randn(4096, 256), 4096 * 2
    found = step_time(traced(Mlp(), x), [x.half().to("meta")], GPU, compiled=True)
    assert found.launches == 4
    assert found.by_kind()["elementwise"] == pytest.approx(moved(2 * 512 * row) + moved(3 * 256 * row) + 2 * LAUNCH)


def test_views_cost_nothing_and_copies_what_they_move():
    class Views(nn.Module):
        def forward(self, x):
            return x.view(64, 64, 256).transpose(0, 1)[1:].unsqueeze(0), x.t().contiguous()

    x = torch.randn(4096, 256)
    found = step_time(traced(Views(), x), [x.half().to("meta")], GPU)
    assert (found.launches, found.seconds) == (1, pytest.approx(moved(2 * 4096 * 256 * 2) + LAUNCH))


def test_our_operators_are_counted_by_their_own_kernels():
    """Statistics in two kernels; normalized codes, a convolution with the residual in its epilogue, no addition."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(4, 64), nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x):
            return x + self.conv(functional.silu(self.norm(x)))

    from engines.torch_graph import fusions

    model, x = Block(), torch.randn(2, 64, 32, 32).half().to(memory_format=torch.channels_last)
    rewritten = drafted(model, {"conv": site_of(model.conv)}, x)
    fusions.fuse(rewritten)
    rewritten.tensors = {name: value.to("meta") for name, value in rewritten.tensors.items()}
    found = step_time(rewritten.module(), [x.to("meta"), torch.zeros(2, device="meta")], GPU)
    by_kind = found.by_kind()
    values = x.numel() * 2
    sizes = Matmul(rows=2048, channels=64, taps=9, outputs=64, inputs=2048)
    assert by_kind["layers"] == pytest.approx(expected(sizes, "int4", GPU, quantize=False).seconds + moved(values))
    assert by_kind["norm statistics"] == pytest.approx(moved(values) + 2 * LAUNCH, rel=0.01)
    assert by_kind["quantize"] == pytest.approx(moved(values + values / 4) + LAUNCH, rel=0.01)
    assert "norms" not in by_kind


@pytest.mark.parametrize("compiled", [False, True])
def test_what_enters_our_kernels_is_no_kernel_of_its_own(compiled):
    """A transformer block's MLP: a norm with scale and shift, GEGLU, a gate and the residual. Four kernels; torch.compile fuses nothing into them."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(256, elementwise_affine=False), nn.Linear(256, 1024), nn.Linear(512, 256)

        def forward(self, x):
            shift, scale, gate = x[:, 0], x[:, 1], x[:, 2]
            values, gates = self.up(self.norm(x) * (1 + scale[:, None]) + shift[:, None]).chunk(2, dim=-1)
            return x + gate[:, None] * self.down(values * functional.gelu(gates))

    from engines.torch_graph import fusions

    model, x = Mlp(), torch.randn(2, 2048, 256).half()
    rewritten = drafted(model, {name: site_of(getattr(model, name)) for name in ("up", "down")}, x)
    fusions.fuse(rewritten)
    rewritten.tensors = {name: value.to("meta") for name, value in rewritten.tensors.items()}
    found = step_time(rewritten.module(), [x.to("meta"), torch.zeros(2, device="meta")], GPU, compiled=compiled)
    kernels = [cost for cost in found.costs if "edm_deploy" in cost.name]
    assert [cost.name.split(".")[1] for cost in sorted(kernels, key=lambda cost: cost.name)] == [
        "linear",
        "linear",
        "quantize",
        "quantize_row_normed",
    ]
    assert len(found.costs) == 5  # and the rows of the table
    tokens = 2 * 2048
    both = moved(tokens * 256 * 2.5) + moved(tokens * (1024 * 2 + 512 / 2)) + 2 * LAUNCH
    assert found.by_kind()["quantize"] == pytest.approx(both, rel=0.01)


def test_attention_of_ours_is_three_kernels_and_torchs_one():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(64, 64)

        def forward(self, x):
            q = self.to_q(x).unflatten(-1, (1, 64)).transpose(1, 2)
            return functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)

    model, x, shape = Attending(), torch.randn(2, 1024, 64).half(), (2, 1, 1024, 64)
    found = []
    for ours in (False, True):
        rewritten = drafted(model, {"to_q": site_of(model.to_q)}, x)
        assert len(attention_in_int8(rewritten) if ours else []) == ours
        rewritten.tensors = {name: value.to("meta") for name, value in rewritten.tensors.items()}
        inputs = [x.to("meta"), torch.zeros(2, device="meta")]
        found.append([cost for cost in step_time(rewritten.module(), inputs, GPU).costs if cost.kind == "attention"])
    assert [(cost.launches, cost.seconds) for cost in (*found[0], *found[1])] == [
        (1, pytest.approx(attention_seconds(shape, shape, GPU) + LAUNCH)),
        (3, pytest.approx(attention_s8_seconds(shape, shape, GPU) + 3 * LAUNCH)),
    ]


@pytest.mark.extended  # a trace of a thousand layers
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_model_is_as_far_from_published_steps_as_the_file_says(model):
    chosen = architecture(model)
    traced_model = TracedModel.of(family_named(name_of_family(chosen.class_name)), chosen.config)
    graph = traced_model.graph({})
    for point in [point for point in MEASURED["step"] if point["model"] == model]:
        options = {"compiled": True} if point["compiled"] else {"graph": False}
        found = step_time(graph, traced_model.inputs(point["samples"]), gpu_named(point["gpu"]), **options)
        assert 1e3 * found.seconds / point["ms"] - 1 == pytest.approx(point["error"], abs=0.02), point


def test_on_the_card_that_predictions_are_for_published_steps_are_met_within_a_tenth():
    errors = [point["error"] for point in MEASURED["step"] if point["gpu"] == "rtx3090"]
    assert len(errors) == 3
    assert max(map(abs, errors)) <= 0.10


def test_a_branch_reads_its_first_matrix_in_rounds_of_blocks_of_32_tokens():
    """The quantizer of a layer with a branch of rank 32, and the layer; against those without."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1024, 1024)

        def forward(self, x):
            return self.a(x)

    from engines.torch_graph import fusions

    def time_of(structure: NetworkRewrite) -> dict:
        model, x = Layer(), torch.randn(2, 4096, 1024).half()
        restructure(model, structure)
        sites = {name: site_of(part) for name, part in model.named_modules() if isinstance(part, nn.Linear) and "branch" not in name}
        rewritten = drafted(model, sites, x)
        fusions.fuse(rewritten, branches=True)
        rewritten.tensors = {name: value.to("meta") for name, value in rewritten.tensors.items()}
        return step_time(rewritten.module(), [x.to("meta"), torch.zeros(2, device="meta")], GPU).by_kind()

    plain, branched = time_of(NetworkRewrite()), time_of(NetworkRewrite(branches={"a": 32}))
    tokens, peak = 2 * 4096, 0.8 * GPU.peak("float16")
    low = tokens * 32 * 2
    rounds = 4 * GPU.sms  # 256 blocks on 82 multiprocessors: the last round has 10
    again = rounds * (1024 * 32 * 2 / GPU.l2 + 2 * 32 * 1024 * 32 / peak)
    assert branched["quantize"] - plain["quantize"] == pytest.approx(again, rel=0.2)  # and `low` is written
    added = 2 * tokens * 1024 * 32 / peak + (low + 1024 * 64) / GPU.l2
    assert branched["layers"] - plain["layers"] == pytest.approx(added, rel=0.1)

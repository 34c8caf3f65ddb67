import tomllib

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from edm_deploy.models import family_named, name_of_family
from edm_deploy_tools.benchmarks.traced_step import TracedModel
from edm_deploy_tools.inspection.architectures import architecture
from engines.performance.gpus import TABLE, Gpu, gpu_named, launch_seconds
from engines.performance.roofline import Matmul, expected, others
from engines.performance.step_time import SOFTMAX_CYCLES, attention_seconds, step_time
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


@pytest.mark.parametrize(("width", "padded"), [(40, 64), (64, 64), (72, 96), (80, 96), (160, 192)])
def test_attention_computes_the_head_dimension_that_its_kernel_has(width, padded):
    shape = (2, 41, 4096, width)  # 2624 tiles, 32 for each multiprocessor
    cycles = 4 * padded / 512 + SOFTMAX_CYCLES
    assert attention_seconds(shape, shape, shape, GPU) == pytest.approx(32 * 128 * 4096 * cycles / GPU.clock)
    assert attention_seconds(shape, shape, shape, GPU, "int8") < attention_seconds(shape, shape, shape, GPU)


@pytest.mark.parametrize("point", MEASURED["attention"], ids=lambda point: point["source"][:24])
def test_attention_is_as_far_from_each_measured_point_as_the_file_says(point):
    shape = (point["shape"]["batch"], point["shape"]["heads"], point["shape"]["length"], point["shape"]["width"])
    figures = point["gpu"]
    gpu = Gpu(
        name="", title="", sm="sm_86", sms=figures["sms"], clock=figures["clock_mhz"] * 1e6, dram=1, l2=1, l2_size=1,
        ops={"float16": figures["float16"]},
    )  # fmt: skip
    operations = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
    error = operations / attention_seconds(shape, shape, shape, gpu) / 1e12 / point["tops"] - 1
    assert error == pytest.approx(point["error"], abs=0.015)


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

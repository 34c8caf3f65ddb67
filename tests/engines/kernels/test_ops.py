"""The operators on the CPU: numbers by hand, comparison with the reference, tracing."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.reference import ReferenceSite
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.kernel_layout import bits_of, pack_weight, unpack_codes, weight_sum, zero_codes
from edm_deploy.runtime.capabilities import code_format
from engines.kernels import ops

OPS = torch.ops.edm_deploy
RANGES = {"s4": ([-8, -3], [7, 4]), "u4": ([-3, -12], [12, 3]), "s8": ([-128, -100], [127, 127])}
HALF = torch.float16


def table(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale, qmin, qmax [2]; powers of two apart from a factor, so that rounding is put to the test."""
    qmin, qmax = (torch.tensor(bounds, dtype=torch.int32) for bounds in RANGES[kind])
    return torch.tensor([0.11, 0.3]), qmin, qmax


def site_of(op: str, kind: str, *shape: int) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(0)
    limit = 127 if kind == "s8" else 7
    codes = torch.randint(-limit, limit + 1, shape, dtype=torch.int8, generator=generator)
    scale, qmin, qmax = table(kind)
    activation = ActivationTable(bits=bits_of(kind), scale=scale, qmin=qmin.to(torch.int8), qmax=qmax.to(torch.int8))
    weight_scale = torch.rand(shape[0], generator=generator) + 0.5
    return QuantizedLayer(op=op, codes=codes, weight_scale=weight_scale, weight_bits=bits_of(kind), activation=activation)


def quantize_arguments(site: QuantizedLayer, kind: str, rows: torch.Tensor, activation: str = "none") -> tuple:
    a = site.activation
    return rows, a.inv_scale, a.qmin.int(), a.qmax.int(), bits_of(kind), kind == "u4", activation, 0


def sum_arguments(
    site: QuantizedLayer,
    kind: str,
    codes: torch.Tensor,
    rows: torch.Tensor,
    bias=None,
    residual=None,
    sample_bias=None,
    gate=None,
    saturate=False,
    branch=(None, None),
) -> tuple:
    a, bits = site.activation, bits_of(kind)
    zero = zero_codes(a.qmin.int(), bits, unsigned=kind == "u4")
    packed = pack_weight(site.codes, bits)
    return (
        codes,
        rows,
        packed,
        zero,
        a.scale,
        a.qmin.int(),
        site.weight_scale,
        weight_sum(site.codes),
        bias,
        sample_bias,
        gate,
        residual,
        *branch,
        saturate,
        kind,
    )


def recorded(layer: nn.Module, site: QuantizedLayer, bias: torch.Tensor | None, x: torch.Tensor, rows: torch.Tensor) -> ReferenceSite:
    reference = ReferenceSite(layer, site, bias)
    reference.rows, reference.recording = rows.long(), True
    reference(x)
    return reference


def test_a_code_rounds_half_to_even_and_stops_at_its_bounds():
    x = torch.tensor([[0.5, 1.5, -2.5, 9.0, -9.0, float("nan")]], dtype=HALF)
    row, one = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    qmin, qmax = torch.tensor([-3], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    codes = OPS.quantize(x, row, one, qmin, qmax, 8, False, "none", 0)
    assert codes.shape == (1, 1, 1, 16)
    assert codes.flatten().view(torch.int8)[:6].tolist() == [0, 2, -2, 4, -3, -3]
    unsigned = OPS.quantize(x, row, one, qmin, qmax, 4, True, "none", 0)
    assert unsigned.flatten()[:3].tolist() == [0x53, 0x71, 0x00]  # n + 3, the even channel in the low nibble


def test_each_sample_has_its_own_row():
    x = torch.ones(2, 1, dtype=HALF)
    rows = torch.tensor([1, 0], dtype=torch.int32)
    bounds = torch.full((2,), -8, dtype=torch.int32), torch.full((2,), 7, dtype=torch.int32)
    codes = OPS.quantize(x, rows, torch.tensor([1.0, 3.0]), *bounds, 8, False, "none", 0)
    assert codes[:, 0, 0, 0].tolist() == [3, 1]


def test_one_product_by_hand():
    """(2 - -3) * 7 summed, corrected by -3 * 7, times 0.5 * 4, plus 1: 2 * 7 * 2 + 1 = 29; padding with real 0 adds nothing."""
    rows, one = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    qmin, qmax = torch.tensor([-3], dtype=torch.int32), torch.tensor([12], dtype=torch.int32)
    codes = OPS.quantize(torch.full((1, 1, 1, 1), 2.0, dtype=HALF), rows, one, qmin, qmax, 4, True, "none", 0)
    weight = torch.full((1, 1, 3, 3), 7, dtype=torch.int8)
    operands = (codes, rows, pack_weight(weight, 4), zero_codes(qmin, 4, unsigned=True), one * 0.5, qmin, one * 4, weight_sum(weight))
    y = OPS.conv2d(*operands, one, None, None, None, None, None, False, "u4", [3, 3], 1, 1, HALF)
    assert y.item() == 29


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["s4", "u4", "s8"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 2, 0), (2, 2, 0)])
def test_a_convolution_agrees_with_the_reference(kind, kernel, stride, padding, dtype):
    site = site_of("conv2d", kind, 7, 37, kernel, kernel)
    assert code_format(site) == kind
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 37, 6, 5, generator=generator).to(dtype)
    bias = torch.randn(7, generator=generator)
    rows = torch.tensor([1, 0, 1], dtype=torch.int32)
    layer = nn.Conv2d(37, 7, kernel, stride, padding)
    record = recorded(layer, site, bias, x.float(), rows).record

    codes = OPS.quantize(x, *quantize_arguments(site, kind, rows))
    stored = unpack_codes(codes, bits_of(kind), unsigned=kind == "u4", channels=37).int()
    n = stored + site.activation.qmin.int()[rows.long()][:, None, None, None] if kind == "u4" else stored
    assert torch.equal(n.permute(0, 3, 1, 2), record.codes.int())

    y = OPS.conv2d(*sum_arguments(site, kind, codes, rows, bias), [kernel, kernel], stride, padding, dtype)
    assert y.shape == record.y.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The reference rounds (scale * scale * sum) once from float64; ours rounds four times in float32, then both to `dtype`.
    torch.testing.assert_close(y, record.y.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("kind", ["s4", "u4", "s8"])
@pytest.mark.parametrize("leading", [(3,), (3, 5), (3, 2, 2, 2)])
def test_a_linear_of_any_leading_axes_agrees_with_the_reference(kind, leading):
    site = site_of("linear", kind, 9, 33)
    x = torch.randn(*leading, 33, generator=torch.Generator().manual_seed(1)).to(HALF)
    rows = torch.tensor([1, 0, 1], dtype=torch.int32)
    record = recorded(nn.Linear(33, 9), site, None, x.float(), rows).record
    codes = OPS.quantize(x.flatten(1, -2) if x.ndim == 4 else x, *quantize_arguments(site, kind, rows))
    y = OPS.linear(*sum_arguments(site, kind, codes, rows), list(leading), HALF)
    assert y.shape == (*leading, 9)
    torch.testing.assert_close(y, record.y.to(HALF), rtol=2 * torch.finfo(HALF).eps, atol=1e-4)


def test_the_epilogue_is_float32_step_by_step():
    """By numpy, which fuses nothing: bits, not nearness."""
    site = site_of("linear", "s8", 50, 64)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 64, generator=generator).to(HALF)
    rows = torch.tensor([0, 1], dtype=torch.int32)
    bias, residual = torch.randn(50, generator=generator), torch.randn(2, 4, 50, generator=generator).to(HALF)
    sample_bias, gate = torch.randn(2, 150, generator=generator).to(HALF).chunk(3, dim=1)[1:]  # rows 150 apart
    codes = OPS.quantize(x, *quantize_arguments(site, "s8", rows))
    y = OPS.linear(*sum_arguments(site, "s8", codes, rows, bias, residual, sample_bias, gate), [2, 4], HALF)
    total = codes[:, :, 0].view(torch.int8).numpy().astype("int32") @ site.codes.numpy().astype("int32").T
    scale = site.activation.scale.numpy()[:, None, None] * site.weight_scale.numpy()
    before, factor, after = (column.numpy().astype("float32") for column in (sample_bias[:, None], gate[:, None], residual))
    expected = (((total.astype("float32") * scale + bias.numpy()) + before) * factor + after).astype("float16")
    assert expected.dtype == "float16"
    assert (y.numpy() == expected).all()


def test_a_saturated_result_is_the_largest_float16_and_nan_stays():
    site = site_of("linear", "s8", 4, 16)
    rows = torch.zeros(2, dtype=torch.int32)
    codes = OPS.quantize(torch.zeros(2, 16, dtype=HALF), *quantize_arguments(site, "s8", rows))
    sample_bias = torch.tensor([[6e4, -6e4, 1.0, float("nan")]] * 2).to(HALF)
    residual = torch.tensor([[3e4, -3e4, 1.0, 1.0]] * 2).to(HALF)
    for saturate, largest in ((True, 65504), (False, float("inf"))):
        y = OPS.linear(*sum_arguments(site, "s8", codes, rows, None, residual, sample_bias, None, saturate), [2], HALF)
        assert y[:, :3].tolist() == [[largest, -largest, 2.0]] * 2
        assert y[:, 3].isnan().all()


def test_a_long_sum_stays_exact():
    """Beyond 2^24 the arithmetic changes to float64: 128 * 127 * 2304 - 1 needs 26 bits."""
    codes = torch.full((1, 1, 1, 2304), 0x80, dtype=torch.uint8)
    codes[..., 0] = 0x81  # -127
    weight = torch.full((1, 2304), -127, dtype=torch.int8)
    rows, one, zero = torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    tables = (zero_codes(zero, 8, unsigned=False), one * 2.0**-24, zero, one, weight_sum(weight))
    bias = torch.tensor([-128 * 127 * 2304 * 2.0**-24])
    y = OPS.linear(codes, rows, pack_weight(weight, 8), *tables, bias, None, None, None, None, None, False, "s8", [1], torch.bfloat16)
    assert y.item() == -128 * 2.0**-24  # float32 rounds the sum 37453824 - 127 = 37453697 to a multiple of 4: 37453696


def test_memory_formats_give_the_same_codes():
    site = site_of("conv2d", "s4", 4, 20, 1, 1)
    x = torch.randn(2, 20, 4, 6, dtype=HALF)
    arguments = quantize_arguments(site, "s4", torch.tensor([0, 1], dtype=torch.int32))
    expected = OPS.quantize(x, *arguments)
    assert torch.equal(OPS.quantize(x.to(memory_format=torch.channels_last), *arguments), expected)
    assert torch.equal(OPS.quantize(x.transpose(2, 3).contiguous().transpose(2, 3), *arguments), expected)
    as_tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(OPS.quantize(as_tokens, *arguments).view_as(expected), expected)


def test_silu_comes_before_the_rounding():
    x = torch.linspace(-6, 6, 64).to(HALF).reshape(1, 64)
    table = (
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([8.0]),
        torch.tensor([-128], dtype=torch.int32),
        torch.tensor([127], dtype=torch.int32),
    )
    codes = OPS.quantize(x, *table, 8, False, "silu", 0).view(torch.int8).flatten()
    expected = (nn.functional.silu(x.double()) * 8).round()
    assert torch.equal(codes.double(), expected.flatten())


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_in_two_steps_agrees_with_torch(affine):
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(2, 12, 5, 4, generator=generator) * 3 + 100).to(HALF)  # far from 0: E[x^2] - E[x]^2 would lose it
    gamma, beta = torch.randn(2, 12, generator=generator) if affine else (None, None)
    norm = nn.GroupNorm(4, 12, eps=1e-5, affine=affine, dtype=torch.float64)
    if affine:
        norm.load_state_dict({"weight": gamma, "bias": beta})
    mean, rstd = OPS.group_stats(x, 4, 1e-5)
    rows, qmin, qmax = torch.zeros(2, dtype=torch.int32), torch.tensor([-128], dtype=torch.int32), torch.tensor([127], dtype=torch.int32)
    codes = OPS.quantize_normed(x, mean, rstd, gamma, beta, 4, rows, torch.tensor([30.0]), qmin, qmax, 8, False, "none")
    codes = codes[..., :12].view(torch.int8).permute(0, 3, 1, 2).double()
    exact = (norm(x.double()).detach() * 30).clamp(-128, 127)
    assert float((codes - exact).abs().max()) <= 0.5 + 1e-3  # rounding, and float32's error of values near 128


@pytest.mark.parametrize("rms", [False, True])
def test_the_norm_of_tokens_agrees_with_torch(rms):
    """LayerNorm and adaLN as diffusers writes it, far from 0; RMSNorm. The rows of the batch have a table row each."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(2, 5, 40, generator=generator) * 3 + (0 if rms else 100)).to(HALF)
    gamma, beta = torch.randn(2, 40, generator=generator)
    scale, shift = torch.randn(2, 3 * 40, generator=generator).to(HALF)[:, :80].chunk(2, dim=1)
    rows, qmin, qmax = (torch.tensor(values, dtype=torch.int32) for values in ([1, 0], [-128, -128], [127, 127]))
    inv_scale = torch.tensor([10.0, 30.0])
    codes = OPS.quantize_row_normed(x, gamma, beta, scale, shift, 1e-5, rms, rows, inv_scale, qmin, qmax, 8, False, 0)
    normed = nn.functional.rms_norm(x.double(), (40,), eps=1e-5) if rms else nn.functional.layer_norm(x.double(), (40,), eps=1e-5)
    exact = (normed * gamma + beta) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    exact = (exact * inv_scale[rows][:, None, None]).clamp(-128, 127)
    assert codes.shape == (2, 5, 1, 48)
    assert float((codes[:, :, 0, :40].view(torch.int8) - exact).abs().max()) <= 0.5 + 1e-3


# ---- tracing


def example(op: str) -> tuple:
    site = site_of("conv2d", "u4", 6, 8, 3, 3)
    rows = torch.tensor([0, 1], dtype=torch.int32)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(4)).to(HALF)
    arguments = quantize_arguments(site, "u4", rows, activation="silu")
    mean, rstd = OPS.group_stats(x, 2, 1e-6)
    if op == "quantize":
        return x, *arguments
    if op == "group_stats":
        return x, 2, 1e-6
    if op == "attention_s8":
        heads = torch.randn(2, 5, 3, 8).to(HALF).transpose(1, 2)
        return heads, heads[:, :, :4], heads[:, :, 1:], None
    if op == "quantize_normed":
        return x, mean, rstd, torch.ones(8), None, 2, *arguments[:-1]
    if op == "quantize_branch":
        down, low_scale = torch.randn(16, 8).to(HALF), torch.randn(2, 16).to(HALF)
        return x.flatten(2).mT, *arguments[:-1], 8, down, low_scale, False, "none", *(None,) * 6, 0, 0.0
    if op == "rotary":
        return torch.randn(2, 5, 3, 16).to(HALF), *torch.randn(2, 5, 16)
    if op == "quantize_row_normed":
        scale, shift = torch.randn(2, 16, generator=torch.Generator().manual_seed(5)).to(HALF).chunk(2, dim=1)
        return x.flatten(2).mT, torch.ones(8), torch.zeros(8), scale, shift, 1e-6, False, *arguments[:-2], 8
    if op == "conv2d":
        codes = OPS.quantize(x, *arguments)
        residual = torch.randn(2, 6, 4, 4).to(HALF)
        sample_bias, gate = torch.randn(2, 12).to(HALF).chunk(2, dim=1)
        branch = torch.randn(2, 8, 4, 4).to(HALF), torch.randn(6, 8).to(HALF)
        return *sum_arguments(site, "u4", codes, rows, torch.ones(6), residual, sample_bias, gate, True, branch), [3, 3], 1, 1, HALF
    linear = site_of("linear", "s8", 6, 8)
    codes = OPS.quantize(x.flatten(2).mT, *quantize_arguments(linear, "s8", rows))
    return *sum_arguments(linear, "s8", codes, rows), [2, 4, 4], torch.bfloat16


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_torch_finds_the_definitions_sound(op):
    torch.library.opcheck(getattr(OPS, op).default, example(op))


class Site4(nn.Module):
    """Quantize and convolve, the two calls that a site becomes."""

    def __init__(self) -> None:
        super().__init__()
        site = site_of("conv2d", "u4", 6, 8, 3, 3)
        self.tables = quantize_arguments(site, "u4", torch.zeros(1, dtype=torch.int32))[1:]
        self.operands = sum_arguments(site, "u4", torch.zeros(1), torch.zeros(1))[2:]

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        codes = OPS.quantize(x, rows, *self.tables)
        return OPS.conv2d(codes, rows, *self.operands, [3, 3], 2, 1, x.dtype)


def test_export_keeps_the_operators_and_a_free_batch():
    model, rows = Site4(), torch.tensor([0, 1, 1], dtype=torch.int32)
    x = torch.randn(3, 8, 4, 4).to(HALF)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (x, rows), dynamic_shapes=({0: batch}, {0: batch}))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"edm_deploy.quantize.default", "edm_deploy.conv2d.default"}
    assert torch.equal(program.module()(x[:2], rows[:2]), model(x[:2], rows[:2]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_makes_one_graph(backend):
    model, rows = Site4(), torch.tensor([0, 1, 1], dtype=torch.int32)
    x = torch.randn(3, 8, 4, 4).to(HALF)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, rows), model(x, rows))


def test_the_operators_need_no_cuda_package():
    """`None` in sys.modules makes an import fail, as on a machine without the extra."""
    hidden = "import sys; sys.modules.update({'cuda': None, 'cuda.bindings': None})\n"
    code = "import engines.kernels.ops, torch; print(torch.ops.edm_deploy.quantize.default.name())\n"
    seen = "print(*[m for m in ('onnx', 'diffusers', 'calibration', 'typer') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", hidden + code + seen], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["edm_deploy::quantize"]

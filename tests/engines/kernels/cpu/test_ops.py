"""The kernels in C++ give the bits of the operators in plain torch, for each instruction set that this machine can compile for and run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edm_deploy.numerics.kernel_layout import pack_codes, pack_weight, unpack_codes, weight_sum
from engines.kernels import torch_ops
from engines.kernels.cpu.build import TARGET
from engines.kernels.cpu.launch import KERNELS
from engines.kernels.cpu.memory import Memory
from engines.kernels.cpu.ops import RecordedOps
from engines.kernels.cpu.weights import Weights
from engines.kernels.operands import ConvShape, Operands, Table
from tests.engines.kernels.helpers import draws
from tests.engines.kernels.test_cuda_ops import STATS_ERROR, assert_same_bits, assert_same_codes

TARGETS = {
    "native": TARGET,
    "tiles": f"{TARGET} -DEDM_EMULATED_TILES",
    "avx-vnni": "-march=alderlake",
    "avx2": "-march=x86-64-v3",
    "portable": "-march=x86-64",
}
NEEDS = {"avx-vnni": {"avx_vnni", "gfni", "vaes"}, "avx2": {"avx2", "fma", "f16c"}}  # of /proc/cpuinfo, to run what is compiled
FLAGS = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.M)[1].split())


@pytest.fixture(
    params=[name if name in ("native", "tiles", "avx2") else pytest.param(name, marks=pytest.mark.extended) for name in TARGETS]
)
def recorded(request) -> RecordedOps:
    if missing := NEEDS.get(request.param, set()) - FLAGS:
        pytest.skip(f"this CPU cannot run code for {request.param}: it has no {', '.join(sorted(missing))}")
    ops = RecordedOps(Weights(), Memory(), 2, TARGETS[request.param])
    assert ops._tiles or request.param != "tiles"  # they are not used where they compute something else
    return ops


def with_8_bits(table: Table) -> Table:
    return replace(table, bits=8, unsigned=False)


def as_s8(operands: Operands) -> Operands:
    """The same product on codes of 8 bits, as an engine widens them."""
    kind, channels = operands.kind, operands.codes.shape[-1] * (1 if operands.kind == "s8" else 2)
    bits = 8 if kind == "s8" else 4
    codes = unpack_codes(operands.codes, bits, unsigned=kind == "u4", channels=channels)
    if kind == "u4":
        codes = codes + operands.qmin[operands.rows.long()].to(torch.int8)[:, None, None, None]
    weight = unpack_codes(operands.weight, bits, channels=channels)
    zero = torch.zeros_like(operands.zero)
    return replace(operands, codes=pack_codes(codes, 8), weight=pack_codes(weight, 8), zero=zero, kind="s8")


def a_sum(seed: int) -> tuple[Operands, ConvShape, torch.dtype]:
    drawn = draws.a_sum(seed, largest=6)
    operands = as_s8(drawn.operands)
    shape = operands.shape("test", (drawn.kernel, drawn.kernel), drawn.stride, drawn.padding)
    if operands.residual is not None:
        residual = operands.residual if drawn.leading else operands.residual.permute(0, 2, 3, 1)
        operands = replace(operands, residual=residual.reshape(shape.M, shape.K).contiguous())
    return operands, shape, drawn.dtype


@pytest.mark.parametrize("seed", range(16))
def test_sums_are_those_of_plain_torch(seed, recorded):
    operands, shape, dtype = a_sum(seed)
    assert_same_bits(recorded.convolve(operands, shape, dtype), torch_ops.convolve(operands, shape, dtype))


def narrow_convolution(seed: int, low: int, high: int) -> tuple[Operands, ConvShape]:
    """A 3x3 convolution with stride 1 whose codes lie in [low, high], weights in 4 bits."""
    dice = draws.Dice(seed)
    batch, channels, outputs = dice.number(1, 3), dice.number(17, 130), dice.number(33, 150)
    height, width, padding = dice.number(3, 13), dice.number(3, 13), dice.number(0, 1)
    weight = dice.codes(-8, 7, outputs, channels, 3, 3).to(torch.int8)
    operands = Operands(
        codes=pack_codes(dice.codes(low, high, batch, height, width, channels), 8),
        rows=dice.codes(0, draws.ROWS - 1, batch),
        weight=pack_weight(weight, 8),
        zero=torch.zeros(draws.ROWS, 16, dtype=torch.uint8),
        act_scale=dice.normal(draws.ROWS).abs() * 0.1 + 0.01,
        qmin=torch.full((draws.ROWS,), low, dtype=torch.int32),
        weight_scale=dice.normal(outputs).abs() * 0.01 + 0.001,
        weight_sum=weight_sum(weight),
        bias=dice.normal(outputs),
        sample_bias=None,
        gate=None,
        residual=None,
        low=None,
        up=None,
        saturate=False,
        kind="s8",
    )
    return operands, operands.shape("test", (3, 3), 1, padding)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-32, 31)])
def test_winograds_sums_are_the_direct_ones(seed, low, high, recorded):
    """Extreme codes too: whole tiles of the smallest and the largest."""
    operands, shape = narrow_convolution(seed, low, high)
    half = operands.codes.shape[2] // 2
    operands.codes[:, :, :half] = pack_codes(torch.tensor([low if seed % 2 else high]), 8)[0]
    recorded.memory.bounds[operands.codes.data_ptr()] = (low, high)
    found = recorded.convolve(operands, shape, torch.bfloat16)
    assert kernels_of(recorded) == (["winograd"] if operands.codes.shape[-1] >= 32 and not recorded._tiles else ["convolve"])
    assert_same_bits(found, torch_ops.convolve(operands, shape, torch.bfloat16))


@pytest.mark.parametrize(("channels", "taps"), [(520, 3), (4200, 1)])
def test_weights_beyond_the_cache_are_read_in_pieces(channels, taps, recorded):
    dice = draws.Dice(channels)
    operands, _ = narrow_convolution(0, -128, 127)
    weight = dice.codes(-127, 127, 70, channels, taps, taps).to(torch.int8)
    operands = replace(
        operands,
        codes=pack_codes(dice.codes(-128, 127, 1, 11, 10, channels), 8),
        rows=dice.codes(0, draws.ROWS - 1, 1),
        weight=pack_weight(weight, 8),
        weight_scale=dice.normal(70).abs() * 0.01,
        weight_sum=weight_sum(weight),
        bias=dice.normal(70),
    )
    shape = operands.shape("test", (taps, taps), 1, taps // 2)
    assert_same_bits(recorded.convolve(operands, shape, torch.float16), torch_ops.convolve(operands, shape, torch.float16))


@pytest.mark.parametrize(("channels", "outputs"), [(64, 16), (128, 33), (192, 150), (80, 64)])
@pytest.mark.parametrize(("size", "taps"), [((31, 1), 1), ((32, 1), 1), ((75, 1), 1), ((9, 8), 3)])
def test_codes_are_read_in_place_or_laid_out(size, taps, channels, outputs, recorded):
    """32 pixels of a linear layer with a multiple of 64 channels are a whole operand of AMX."""
    dice = draws.Dice(channels)
    operands, _ = narrow_convolution(0, -128, 127)
    weight = dice.codes(-127, 127, outputs, channels, taps, taps).to(torch.int8)
    operands = replace(
        operands,
        codes=pack_codes(dice.codes(-128, 127, 2, *size, channels), 8),
        rows=dice.codes(0, draws.ROWS - 1, 2),
        weight=pack_weight(weight, 8),
        weight_scale=dice.normal(outputs).abs() * 0.01,
        weight_sum=weight_sum(weight),
        bias=dice.normal(outputs),
    )
    shape = operands.shape("test", (taps, taps), 1, 0)
    assert_same_bits(recorded.convolve(operands, shape, torch.bfloat16), torch_ops.convolve(operands, shape, torch.bfloat16))


def kernels_of(recorded: RecordedOps) -> list[str]:
    return [KERNELS[step[0]] for step in recorded.steps if isinstance(step, tuple)]


def test_codes_of_unknown_or_wide_bounds_are_multiplied_directly(recorded):
    operands, shape = narrow_convolution(1, -8, 7)
    recorded.convolve(operands, shape, torch.bfloat16)
    recorded.memory.bounds[operands.codes.data_ptr()] = (-128, 127)
    recorded.convolve(operands, shape, torch.bfloat16)
    assert kernels_of(recorded) == ["convolve", "convolve"]


@pytest.mark.parametrize("seed", range(16))
def test_codes_are_those_of_plain_torch(seed, recorded):
    drawn = draws.quantization(seed, largest=6)
    drawn = replace(drawn, table=with_8_bits(drawn.table))
    arguments = drawn.x, drawn.norm, drawn.table
    behind = {"activation": drawn.activation, "rotation": drawn.rotation}
    found = recorded.quantize(*arguments, **behind)
    assert_same_codes(drawn, found, torch_ops.quantize(*arguments, **behind))
    assert recorded.memory.bounds[found.data_ptr()] == (int(drawn.table.qmin.min()), int(drawn.table.qmax.max()))


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_every_half_is_quantized_as_in_plain_torch(activation, recorded):
    """All float16 and bfloat16 numbers, NaN and infinities among them, at a scale that has ties."""
    table = one_row(inv_scale=16.0, low=-100, high=99)
    for dtype in draws.TYPES:
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 256, 256)
        found = recorded.quantize(x, None, table, activation=activation)
        assert torch.equal(found, torch_ops.quantize(x, None, table, activation=activation))


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_rotated_codes_are_those_of_plain_torch(activation, block, recorded):
    """One and three blocks, and more channels than are rotated at a time."""
    table = one_row(inv_scale=16.0, low=-100, high=99)
    for channels in (block, 3 * block, 1024 + 256 + block):
        x = draws.Dice(block).normal(1, 5, channels * (2 if activation == "geglu" else 1)).to(torch.bfloat16)
        found = recorded.quantize(x, None, table, activation=activation, rotation=block)
        assert torch.equal(found, torch_ops.quantize(x, None, table, activation=activation, rotation=block))


def one_row(inv_scale: float, low: int, high: int) -> Table:
    columns = (torch.tensor([bound], dtype=torch.int32) for bound in (low, high))
    return Table(torch.zeros(1, dtype=torch.int32), torch.tensor([inv_scale]), *columns, 8, unsigned=False)


@pytest.mark.parametrize("seed", range(10))
def test_codes_of_normalized_tokens_are_those_of_plain_torch(seed, recorded):
    """But for ties: the sums of a token have another order."""
    drawn = draws.row_normalization(seed, largest=12)
    table = with_8_bits(drawn.table)
    found = recorded.quantize_rows(drawn.x, drawn.norm, table, rotation=drawn.rotation).view(torch.int8).int()
    expected = torch_ops.quantize_rows(drawn.x, drawn.norm, table, rotation=drawn.rotation).view(torch.int8).int()
    assert int((found - expected).abs().max()) <= 1
    assert int((found != expected).sum()) <= 2 + found.numel() // 1000


@pytest.mark.parametrize("seed", range(8))
def test_statistics_are_those_of_plain_torch(seed, recorded):
    drawn = draws.statistics(seed, largest=40)
    for found, expected in zip(recorded.group_stats(*drawn), torch_ops.group_stats(*drawn), strict=True):
        torch.testing.assert_close(found, expected, rtol=STATS_ERROR, atol=1e-5)


def test_statistics_of_a_constant_group_are_exact(recorded):
    x = torch.full((2, 33, 20, 20), 7.0).bfloat16()
    mean, rstd = recorded.group_stats(x, 3, 0.25)
    assert mean.tolist() == [[7.0] * 3] * 2
    assert rstd.tolist() == [[2.0] * 3] * 2


def test_an_outlier_as_first_pixel_does_not_shift_the_statistics(recorded):
    x = torch.full((1, 2, 128, 128), 0.3).bfloat16().to(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 1, 64, 3] = 1001.0, -4000.0
    for found, expected in zip(recorded.group_stats(x, 2, 1e-5), torch_ops.group_stats(x, 2, 1e-5), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "channels"), [(256, 256, 64), (70, 33, 40), (1, 1, 8), (65, 129, 160), (3, 77, 5)])
def test_attention_is_that_of_float64(queries, keys, channels, recorded):
    generator = torch.Generator().manual_seed(queries)
    for dtype, error in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)):
        q, k, v = (
            (2 * torch.randn(2, length, 3, channels, generator=generator)).to(dtype).transpose(1, 2) for length in (queries, keys, keys)
        )
        found = recorded.attention(q, k, v, 0.3)
        expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
        assert found.transpose(1, 2).is_contiguous()
        assert float((found.double() - expected).norm() / expected.norm()) < error
    assert torch.equal(recorded.attention(q, k, v, None), recorded.attention(q, k, v, channels**-0.5))


@pytest.mark.parametrize("dtype", draws.TYPES)
def test_large_scores_do_not_overflow(dtype, recorded):
    q = torch.full((1, 1, 2, 16), 200.0).to(dtype)
    k = torch.cat([torch.full((1, 1, 100, 16), -200.0), torch.full((1, 1, 1, 16), 200.0)], 2).to(dtype)
    v = torch.arange(101).view(1, 1, 101, 1).expand(1, 1, 101, 16).to(dtype).contiguous()
    assert recorded.attention(q, k, v, 1.0).unique().tolist() == [100.0]


@pytest.mark.parametrize("dtype", draws.TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_key_or_query_that_is_no_number_shows(bad, dtype, recorded):
    """As in torch: every query meets the key, and only its own row the query."""
    x = torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    broken = x.clone()
    broken[0, 1, 69, 3] = bad
    assert recorded.attention(x, broken, x, None).isnan().all(-1).tolist() == [[[False] * 70, [True] * 70]]
    assert recorded.attention(broken, x, x, None).isnan().all(-1).tolist() == [[[False] * 70, [False] * 69 + [True]]]


@pytest.mark.parametrize("odd", ["channels", "stride", "scale"])
def test_attention_that_cannot_be_read_in_pairs(odd, recorded):
    """Heads that begin at an odd channel, or a negative scale, are computed in float32."""
    width = 15 if odd == "channels" else 16
    whole = torch.randn(2, 70, 3, width + (odd == "stride"), generator=torch.Generator().manual_seed(0)).bfloat16()
    x = whole[..., :width].transpose(1, 2)
    scale = -0.3 if odd == "scale" else 0.3
    expected = functional.scaled_dot_product_attention(*3 * [x.double()], scale=scale)
    assert float((recorded.attention(x, x, x, scale).double() - expected).norm() / expected.norm()) < 2.0**-8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concatenations_are_torchs(axis, recorded):
    shapes = [[3, 4, 5] for _ in range(3)]
    shapes[1][axis] = 7
    parts = [torch.randn(shape).bfloat16() for shape in shapes]
    assert torch.equal(recorded.concatenate(parts, axis), torch.cat(parts, axis))


def test_parts_of_one_sample_are_concatenated_whatever_their_stride(recorded):
    """[1, 4] cut from [1, 8] is contiguous with a stride of 8."""
    whole = torch.arange(8.0).view(1, 8)
    parts = [whole[:, 4:], whole[:, :4]]
    assert parts[0].is_contiguous()
    assert recorded.concatenate(parts, 1).tolist() == [[4, 5, 6, 7, 0, 1, 2, 3]]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsampling_repeats_pixels(factor, recorded):
    x = torch.randn(2, 3, 4, 5).half()
    expected = functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=factor).permute(0, 2, 3, 1)
    assert torch.equal(recorded.upsample(x, factor), expected)


def test_results_do_not_depend_on_the_number_of_threads():
    def results(threads: int) -> list[Tensor]:
        recorded = RecordedOps(Weights(), Memory(), threads)
        operands, shape = narrow_convolution(4, -8, 7)
        direct = recorded.convolve(operands, shape, torch.bfloat16)
        recorded.memory.bounds[operands.codes.data_ptr()] = (-8, 7)
        x = torch.randn(2, 48, 30, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
        q = x.view(2, 48, 900).transpose(1, 2).contiguous().view(2, 900, 3, 16).transpose(1, 2)
        return [
            direct,
            recorded.convolve(operands, shape, torch.bfloat16),
            *recorded.group_stats(x, 4, 1e-5),
            recorded.attention(q, q, q, None),
        ]

    one = results(1)
    for threads in (2, 3, 7):
        for found, expected in zip(results(threads), one, strict=True):
            assert torch.equal(found, expected)


def test_a_replay_copies_again_what_is_not_dense():
    """A residual that is a slice or channels first, and a quantizer's input of five axes in another order."""
    operands, shape = narrow_convolution(2, -128, 127)
    dense = torch.randn(shape.N, shape.P, shape.Q, 2 * shape.K).bfloat16()
    first = torch.randn(shape.N, shape.K, shape.P, shape.Q).bfloat16()
    five = torch.randn(2, 4, 3, 2, 32).bfloat16()
    table = one_row(inv_scale=16.0, low=-100, high=99)
    table = replace(table, rows=torch.zeros(2, dtype=torch.int32))

    def results(run) -> list[Tensor]:
        convolved = [
            run.convolve(replace(operands, residual=residual), shape, torch.bfloat16)
            for residual in (dense[..., : shape.K], first.permute(0, 2, 3, 1))
        ]
        return [*convolved, run.quantize(five.permute(0, 2, 1, 3, 4), None, table)]

    recorded = RecordedOps(Weights(), Memory(), 1)
    found = results(recorded)
    for changing in (dense, first, five):
        changing.mul_(-2)
    recorded.replayed()()
    for one, expected in zip(found, results(torch_ops), strict=True):
        assert torch.equal(one, expected)


def test_memory_that_nothing_writes_again_is_refused():
    recorded = RecordedOps(Weights(), Memory(), 1, stays=lambda tensor: False)
    with pytest.raises(AssertionError, match="quantize was given x in memory that the recording does not own"):
        recorded.quantize(torch.zeros(1, 16).bfloat16(), None, one_row(1.0, -8, 7))


def test_a_replay_computes_from_the_memory_as_it_is_then():
    recorded = RecordedOps(Weights(), Memory(), 1)
    x = torch.randn(1, 4, 16).bfloat16()
    table = one_row(inv_scale=1.0, low=-8, high=7)
    strided = x.transpose(1, 2)  # copied, which is a step of its own
    first, second = recorded.quantize(x, None, table), recorded.quantize(strided, None, table)
    x.copy_(3 * torch.randn(1, 4, 16))
    recorded.replayed()()
    assert torch.equal(first, torch_ops.quantize(x, None, table))
    assert torch.equal(second, torch_ops.quantize(strided, None, table))

"""From tensors to kernels and back: the launches that the operators make give the bits of their CPU arithmetic.

Here they run in the emulator, on CPU memory: names, grids, structs, tiles and splits are the ones that a GPU gets. Where there is a GPU, the same draws, and larger
ones, go through the operators themselves.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.kernels import cuda_ops, ops, torch_ops
from engines.kernels.tiles import TILES
from tests.engines.kernels.helpers import draws

OPS = torch.ops.edm_deploy
assert ops.SCHEMAS  # importing it defines the operators
SILU_ERROR = 2.0**-18  # relative: 2^-19 of the kernel's, and the CPU's own rounding
STATS_ERROR = 1e-5  # relative: float32 sums of a few thousand values against float64


def assert_same_codes(drawn: draws.Quantization, found: Tensor, expected: Tensor) -> None:
    """Equal; behind a SiLU or GELU by tanh, which a GPU approximates, a code may be one off where its value lies between two."""
    if drawn.activation not in ("silu", "gelu_tanh"):
        assert torch.equal(found, expected)
        return
    bits, unsigned = drawn.table.bits, drawn.table.unsigned
    found, expected = (torch_ops.unpack_codes(codes, bits, unsigned=unsigned).int() for codes in (found, expected))
    values = torch_ops.pixels(drawn.x).float()
    values = (values if drawn.norm is None else torch_ops.normed(values, drawn.norm)).double()
    inner = values if drawn.activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (values + 0.044715 * values**3)
    scaled = values * inner.sigmoid() * drawn.table.inv_scale[drawn.table.rows.long()][:, None, None, None]
    to_tie = (scaled - scaled.floor() - 0.5).abs()
    off = found != expected
    assert int((found - expected).abs().max()) <= 1
    assert not off[..., scaled.shape[-1] :].any()
    assert bool((to_tie <= SILU_ERROR * scaled.abs() + 1e-9)[off[..., : scaled.shape[-1]]].all())


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


# ---- in the emulator


@pytest.mark.parametrize("seed", range(40))
def test_codes_are_those_of_the_cpu(seed, launched):
    drawn = draws.quantization(seed, largest=6)
    arguments = drawn.x, drawn.norm, drawn.table
    behind = {"activation": drawn.activation, "rotation": drawn.rotation}
    assert_same_codes(drawn, cuda_ops.quantize(*arguments, **behind), torch_ops.quantize(*arguments, **behind))
    assert len(launched) == 1


@pytest.mark.parametrize("seed", range(24))
def test_codes_of_normalized_tokens_are_those_of_the_cpu(seed, launched):
    drawn = draws.row_normalization(seed, largest=12)
    arguments = drawn.x, drawn.norm, drawn.table
    rotation = {"rotation": drawn.rotation}
    assert torch.equal(cuda_ops.quantize_rows(*arguments, **rotation), torch_ops.quantize_rows(*arguments, **rotation))
    assert len(launched) == 1


@pytest.mark.parametrize("seed", range(40))
def test_sums_are_those_of_the_cpu(seed, launched):
    drawn = draws.a_sum(seed, largest=6)
    shape = drawn.operands.shape("test", (drawn.kernel, drawn.kernel), drawn.stride, drawn.padding)
    operands = drawn.operands
    if operands.residual is not None:
        residual = operands.residual if drawn.leading else operands.residual.permute(0, 2, 3, 1)
        operands = replace(operands, residual=residual.reshape(shape.M, shape.K).contiguous())
    assert_same_bits(cuda_ops.convolve(operands, shape, drawn.dtype), torch_ops.convolve(operands, shape, drawn.dtype))
    assert launched[0].startswith(f"conv_{operands.kind}_")


@pytest.mark.parametrize("seed", range(6))
def test_statistics_are_those_of_the_cpu(seed, launched):
    drawn = draws.statistics(seed, largest=6)
    for found, expected in zip(cuda_ops.group_stats(*drawn), torch_ops.group_stats(*drawn), strict=True):
        torch.testing.assert_close(found, expected, rtol=STATS_ERROR, atol=1e-5)
    assert launched == [f"group_stats_partial_{cuda_ops.TYPE_NAMES[drawn[0].dtype]}", "group_stats_merge"]


def test_a_contiguous_map_is_read_without_a_copy(launched):
    """Channels first needs no copy, unless it is to be normalized; what is contiguous both ways counts as channels last."""
    drawn = draws.quantization(0, largest=6)
    table = replace(drawn.table, rows=torch.zeros(2, dtype=torch.int32))
    x = torch.randn(2, 8, 4, 4, dtype=torch.float16)
    norm = draws.Norm(torch.zeros(2, 2), torch.ones(2, 2), None, None)
    for values, statistics in ((x, None), (x, norm), (x.to(memory_format=torch.channels_last), None), (x[:, :, :1, :1].contiguous(), None)):
        cuda_ops.quantize(values, statistics, table)
    assert ["first" if "first" in entry else "last" for entry in launched] == ["first", "last", "last", "last"]


def test_a_small_map_is_split_and_reduced(launched):
    """One image of 2x2 pixels and 1024 channels of 8 bits: one tile of pixels, so the sum is shared among blocks."""
    dice = draws.Dice(0)
    drawn = draws.a_sum(3, largest=6).operands
    zero, rows = torch.zeros(draws.ROWS, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    codes = dice.codes(0, 255, 1, 2, 2, 1024).to(torch.uint8)
    weight = dice.codes(0, 255, 16, 1, 1024).to(torch.uint8)
    columns = {
        "weight_scale": torch.ones(16),
        "weight_sum": torch.zeros(16, dtype=torch.int32),
        "bias": None,
        "sample_bias": None,
        "gate": None,
        "residual": None,
    }
    operands = replace(drawn, codes=codes, weight=weight, zero=zero, rows=rows, kind="s8", **columns)
    shape = operands.shape("test", (1, 1), 1, 0)
    expected = torch_ops.convolve(operands, shape, torch.bfloat16)
    assert_same_bits(cuda_ops.convolve(operands, shape, torch.bfloat16), expected)
    assert [entry.split("_")[0] for entry in launched] == ["conv", "reduce"]


def test_every_tile_gives_the_same_bits(launched, monkeypatch):
    drawn = draws.a_sum(5, largest=6)
    shape = drawn.operands.shape("test", (drawn.kernel, drawn.kernel), drawn.stride, drawn.padding)
    operands = replace(drawn.operands, residual=None)
    expected = torch_ops.convolve(operands, shape, drawn.dtype)
    for tile in TILES:
        for splits in (1, 3):
            monkeypatch.setattr(cuda_ops, "choose_tile", lambda *_, tile=tile, splits=splits: (tile, splits))
            assert_same_bits(cuda_ops.convolve(operands, shape, drawn.dtype), expected)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_low_rank_branch_is_added_in_the_epilogue(splits, launched):
    """Of numbers in powers of two, so that the sum is exact in any order; `low` is a part of the columns of a wider tensor."""
    drawn, dice = draws.a_sum(5, largest=6), draws.Dice(7)
    shape = drawn.operands.shape("test", (drawn.kernel, drawn.kernel), drawn.stride, drawn.padding)
    scales = {name: torch.exp2(torch.log2(getattr(drawn.operands, name)).round()) for name in ("act_scale", "weight_scale")}
    low = dice.codes(-4, 4, shape.N, shape.P, shape.Q, 40).to(drawn.dtype)[..., 8:32] / 64
    up = dice.codes(-4, 4, shape.K, 24).to(drawn.dtype) / 64
    operands = replace(drawn.operands, residual=None, low=low, up=up, **scales)
    plain = torch_ops.convolve(replace(operands, low=None, up=None), shape, drawn.dtype)
    expected = torch_ops.convolve(operands, shape, drawn.dtype)
    assert not torch.equal(plain, expected)
    assert_same_bits(cuda_ops.convolve(operands, shape, drawn.dtype, on=(TILES[-1], splits)), expected)
    assert launched[-1].startswith("reduce" if splits > 1 else "conv") and launched[-1].endswith("_branch")


def test_an_operand_that_starts_between_chunks_is_copied(launched):
    drawn = draws.a_sum(5, largest=6)
    shape = drawn.operands.shape("test", (drawn.kernel, drawn.kernel), drawn.stride, drawn.padding)
    operands = replace(drawn.operands, residual=None)
    room = torch.empty(operands.codes.numel() + 1, dtype=torch.uint8)
    shifted = room[1:].view(operands.codes.shape).copy_(operands.codes)
    assert shifted.data_ptr() % 16
    expected = torch_ops.convolve(operands, shape, drawn.dtype)
    assert_same_bits(cuda_ops.convolve(replace(operands, codes=shifted), shape, drawn.dtype), expected)


# ---- on a GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(60))
def test_a_gpu_gives_the_bits_of_the_cpu(seed):
    drawn = draws.quantization(seed, largest=6 if seed % 2 else 33)
    op = OPS.quantize if drawn.norm is None else OPS.quantize_normed
    assert_same_codes(drawn, op(*drawn.arguments("cuda")).cpu(), op(*drawn.arguments("cpu")))
    tokens = draws.row_normalization(seed, largest=6 if seed % 2 else 60)
    assert torch.equal(OPS.quantize_row_normed(*tokens.arguments("cuda")).cpu(), OPS.quantize_row_normed(*tokens.arguments("cpu")))
    summed = draws.a_sum(seed, largest=6 if seed % 2 else 33)
    op = OPS.conv2d if summed.leading is None else OPS.linear
    found, expected = op(*summed.arguments("cuda")), op(*summed.arguments("cpu"))
    assert found.stride() == expected.stride()
    assert_same_bits(found.cpu(), expected)
    x, groups, eps = draws.statistics(seed, largest=33)
    for one, other in zip(OPS.group_stats(x.cuda(), groups, eps), OPS.group_stats(x, groups, eps), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=STATS_ERROR, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_graph_replays_with_other_rows_and_values():
    drawn = next(
        one for one in (draws.quantization(seed, largest=6) for seed in range(100)) if one.norm is None and one.activation == "none"
    )
    summed = next(one for one in (draws.a_sum(seed, largest=6) for seed in range(100)) if one.operands.residual is None)
    quantize, convolve = list(drawn.arguments("cuda")), list(summed.arguments("cuda"))
    op = OPS.conv2d if summed.leading is None else OPS.linear
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        OPS.quantize(*quantize), op(*convolve)  # loads the kernels, which a capture could not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        codes, y = OPS.quantize(*quantize), op(*convolve)
    for row in range(draws.ROWS):
        quantize[1].fill_(row), convolve[1].fill_(row)
        quantize[0].mul_(0.75)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(codes.cpu(), OPS.quantize(*(value.cpu() if isinstance(value, Tensor) else value for value in quantize)))
        assert_same_bits(y.cpu(), op(*(value.cpu() if isinstance(value, Tensor) else value for value in convolve)))


@pytest.mark.gpu
@needs_gpu
def test_kernels_run_on_the_current_stream():
    """A long sleep stands before them on a stream of its own: an event behind them is not reached while the default stream is idle."""
    drawn = draws.quantization(1, largest=6)
    op = OPS.quantize if drawn.norm is None else OPS.quantize_normed
    arguments = drawn.arguments("cuda")
    op(*arguments)
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        op(*arguments)
        done.record()
    assert not done.query()
    torch.cuda.synchronize()
    assert done.query()


@pytest.mark.gpu
@needs_gpu
def test_operands_on_two_devices_are_refused():
    drawn = draws.a_sum(1, largest=6)
    arguments = list(drawn.arguments("cuda"))
    arguments[2] = arguments[2].cpu()
    with pytest.raises(ValueError, match=r"weight is uint8 .* on cpu; expected uint8 .* on cuda:0"):
        (OPS.conv2d if drawn.leading is None else OPS.linear)(*arguments)

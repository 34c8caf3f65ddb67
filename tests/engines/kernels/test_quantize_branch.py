"""Quantizing with a branch's first product: the operator against its parts, in torch and in the emulator."""

import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from engines.kernels import ops, quantize_branch, torch_ops
from tests.engines.kernels.helpers import draws

OPS = torch.ops.edm_deploy
assert ops.SCHEMAS
HALF = torch.float16
NO_NORM = ("none", *(None,) * 6, 0, 0.0)


def drawn(norm: str, activation: str, dtype: torch.dtype = HALF, *, rotation: int = 0, channels: int = 64, rank: int = 24):
    """x, a table, and the operands behind it."""
    dice = draws.Dice(3)
    batch, width = 3, channels * (2 if activation == "geglu" else 1)
    x = (dice.normal(batch, 5, width) * 2).to(dtype)
    projection = dice.normal(batch, 4 * channels + 2 * rank).to(dtype)
    groups = 4 if norm == "group" else 0
    statistics = (dice.normal(batch, groups), dice.normal(batch, groups).abs() + 0.5) if groups else (None, None)
    affine = (dice.normal(channels), dice.normal(channels)) if norm != "none" else (None, None)
    of_sample = projection[:, : 2 * channels].chunk(2, dim=1) if norm in ("layer", "rms") else (None, None)
    down, low_scale = dice.normal(rank, channels).to(dtype), projection[:, -2 * rank : -rank]
    operands = quantize_branch.BranchOperands(
        activation, rotation, down, low_scale, rotation > 0, norm, *statistics, *affine, *of_sample, groups, 1e-5
    )
    return x, draws.table_of(dice, batch), operands


@pytest.mark.parametrize(
    ("norm", "activation", "rotation"),
    [("none", "none", 0), ("none", "geglu", 32), ("none", "gelu", 0), ("group", "silu", 0), ("layer", "none", 64), ("rms", "none", 0)],
)
@pytest.mark.parametrize("dtype", draws.TYPES)
def test_codes_and_product_are_those_of_the_parts(norm, activation, rotation, dtype, launched):
    x, table, operands = drawn(norm, activation, dtype, rotation=rotation)
    codes, low = OPS.quantize_branch(x, *vars(table).values(), *vars(operands).values())
    if operands.row_norm is not None:
        expected = torch_ops.quantize_rows(x, operands.row_norm, table, rotation=rotation)
    else:
        expected = torch_ops.quantize(x, operands.group_norm, table, activation=activation, rotation=rotation)
    assert torch.equal(codes, expected)
    assert (low.shape, low.dtype) == ((3, 5, 24), dtype)
    values = torch_ops.pixels(x).double()
    if operands.group_norm is not None:
        values = torch_ops.normed(values.float(), operands.group_norm).double()
    if operands.row_norm is not None:
        values = torch_ops.row_normed(values.float(), operands.row_norm).double()
    values = torch_ops.rotated(torch_ops.activated(values.float(), activation), rotation)
    exact = values[:, :, 0].double() @ operands.down.double().T * operands.low_scale.double()[:, None]
    error = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (low.double() - exact).abs().max() < error
    # The kernel: the same codes but for an exponential's ties, the product to the last bits of its type.
    own_codes, own_low = quantize_branch.on_cuda(x, operands, table)
    rows = "_rows" if operands.row_norm else ""
    assert launched == [f"quantize_branch_{'f16' if dtype == HALF else 'bf16'}_i{table.bits}{rows}"]
    assert (own_codes != codes).float().mean() <= (0.005 if activation == "silu" else 0)
    assert (own_low.double() - exact).abs().max() < error


def test_a_part_of_a_wider_product_is_a_layers_operand(launched):
    """Two layers share a product: each epilogue reads its columns in place."""
    from engines.kernels import cuda_ops

    low = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).to(HALF)
    part = low[:, :, 16:32].reshape(10, 16)
    assert cuda_ops._rows(part).data_ptr() == part.data_ptr()
    assert cuda_ops._rows(low[:, :, 4:12].reshape(10, 8)).is_contiguous()  # does not start at 16 bytes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"norm": "batch"}, InputError, "norm 'batch' with activation 'none'; no kernel has these"),
        ({"norm": "group"}, InputError, "norm 'group' .* or its statistics are missing"),
        ({"norm": "layer", "activation": "silu"}, InputError, "norm 'layer' with activation 'silu'"),
        ({"down": torch.zeros(24, 63, dtype=HALF)}, InputError, r"down is float16 \[24, 63\] on cpu; expected float16 \[24, 64\]"),
        ({"down": torch.zeros(12, 64, dtype=HALF)}, UnsupportedError, "64 channels and rank 12; the kernel has multiples of 8"),
        ({"down": torch.zeros(264, 64, dtype=HALF)}, UnsupportedError, "rank 264; .* a rank of 256 at most. Multiply in torch"),
        ({"low_scale": torch.zeros(2, 24, dtype=HALF)}, InputError, r"low_scale is float16 \[2, 24\] on cpu; expected float16 \[3, 24\]"),
        ({"rotation": 48}, InputError, "rotation in blocks of 48 of 64 channels"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    x, table, operands = drawn("none", "none")
    with pytest.raises(error, match=message):
        OPS.quantize_branch(x, *vars(table).values(), *(vars(operands) | changes).values())


def test_a_map_is_refused():
    x, table, operands = drawn("none", "none")
    with pytest.raises(InputError, match="expected tokens"):
        OPS.quantize_branch(x[..., None], *vars(table).values(), *vars(operands).values())

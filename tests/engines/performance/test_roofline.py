from __future__ import annotations

import tomllib

import pytest

from edm_deploy.network.layer_costs import SiteWork
from engines.kernels.tiles import choose_tile
from engines.performance.gpus import TABLE, gpu_named, launch_seconds
from engines.performance.roofline import Matmul, expected, faster_as_int8, others

MEASURED = tomllib.loads((TABLE.parent / "measured.toml").read_text())
RTX3090, A100, H200 = (gpu_named(name) for name in ("rtx3090", "a100", "h200"))
SD15_64 = Matmul(rows=2 * 64 * 64, channels=320, taps=9, outputs=320)
CIFAR = Matmul(rows=32 * 32, channels=128, taps=9, outputs=128)


@pytest.mark.parametrize("point", MEASURED["point"], ids=lambda point: f"{point['gpu']}-{point['precision']}-{point['tops']}")
def test_the_model_is_as_far_from_each_measured_point_as_the_file_says(point):
    matmul = Matmul(**point["shape"])
    tile = tuple(point["tile"]) if "tile" in point else None
    found = others(
        matmul,
        point["precision"],
        gpu_named(point["gpu"]),
        tile=tile,
        out_bytes=point.get("out_bytes", 2),
        resident=False,
        graph=False,
    )
    error = matmul.operations / found.seconds / 1e12 / point["tops"] - 1
    assert error == pytest.approx(point["error"], abs=0.01)
    assert point["source"]


def test_half_of_the_points_are_met_within_a_tenth_and_none_is_missed_by_half():
    errors = sorted(abs(point["error"]) for point in MEASURED["point"])
    assert errors[len(errors) // 2 - 1] <= 0.11
    assert errors[-1] < 0.5


@pytest.mark.parametrize("ratio", MEASURED["ratio"], ids=lambda ratio: ratio["source"][:16])
def test_ratios_lie_between_the_published_ones(ratio):
    low, high = ratio["between"]
    gpu = gpu_named(ratio["gpu"])
    for shape in ratio["shapes"]:
        matmul = Matmul(**shape)
        assert low <= expected(matmul, "float16", gpu).seconds / expected(matmul, "int8", gpu).seconds <= high


def test_a_single_wave_is_checked_by_hand():
    """82 tiles of 128x128, one for each multiprocessor: 2 * 128 * 128 * 4096 operations at 80 % of 2048 a clock."""
    found = others(Matmul(rows=41 * 128, channels=4096, taps=1, outputs=2 * 128), "int8", RTX3090, tile=(128, 128))
    assert found.parts["tensor cores"] == pytest.approx(2 * 128 * 128 * 4096 / (2048 * 1.695e9 * 0.80))
    assert found.parts["launch"] == launch_seconds(graph=True)


def test_one_row_more_is_a_wave_more():
    one, two = (
        others(Matmul(rows=rows, channels=64, taps=9, outputs=128), "int8", RTX3090, tile=(128, 128)) for rows in (82 * 128, 82 * 128 + 1)
    )
    assert two.splits == one.splits == 1
    assert two.seconds - two.parts["launch"] == pytest.approx(2 * (one.seconds - one.parts["launch"]), rel=0.05)


def test_the_tile_is_the_one_that_the_kernels_choose():
    tile, splits = choose_tile(CIFAR.rows, CIFAR.outputs, 9 * 64, RTX3090.sms)
    found = expected(CIFAR, "int4", RTX3090)
    assert (found.tile, found.splits) == ((tile.BM, tile.BN), splits)


def test_peaks_are_those_of_the_whitepapers():
    assert RTX3090.peak("int8") / 1e12 == pytest.approx(284, rel=0.01)
    assert gpu_named("rtx4090").peak("int4") / 1e12 == pytest.approx(1321, rel=0.01)
    assert A100.peak("float16") / 1e12 == pytest.approx(312, rel=0.01)
    assert H200.peak("float16") / 1e12 == pytest.approx(989, rel=0.01)
    assert H200.peak("int8") / 1e12 == pytest.approx(1979 * 0.629, rel=0.01)  # mma.sync


def test_big_convolutions_gain_from_each_halving_of_the_bits():
    float16, int8, int4 = (expected(SD15_64, bits, RTX3090, fused_quantize=True).seconds for bits in ("float16", "int8", "int4"))
    assert 3 < float16 / int8 < 4.2  # 4x the tensor cores
    assert 1.5 < int8 / int4 < 2.05


def test_small_layers_are_bound_by_their_launches_where_4_bits_buy_little():
    small = expected(CIFAR, "int4", RTX3090)
    assert small.bound == "launch"
    assert expected(CIFAR, "int8", RTX3090).seconds / small.seconds < 1.4  # a large layer gains 1.5 to 2 times


def test_a_fused_quantization_costs_nothing_and_a_separate_one_a_launch_and_a_copy():
    separate, fused = expected(SD15_64, "int4", RTX3090), expected(SD15_64, "int4", RTX3090, fused_quantize=True)
    moved = SD15_64.rows * (2 * 320 + 160)
    assert separate.seconds - fused.seconds == pytest.approx(separate.quantize_seconds)
    assert separate.quantize_seconds == pytest.approx(moved / RTX3090.dram + launch_seconds(graph=True))
    assert fused.quantize_seconds == 0


def test_a_tall_thin_matmul_is_bound_by_its_weights_in_memory():
    found = expected(Matmul(rows=2, channels=8192, taps=1, outputs=8192), "int8", RTX3090)
    assert found.bound == "DRAM"
    assert found.seconds > 8192 * 8192 / RTX3090.dram


def test_int4_runs_as_int8_where_there_are_no_int4_tensor_cores():
    assert not H200.has_int4
    assert expected(SD15_64, "int4", H200) == expected(SD15_64, "int8", H200)


def test_channels_are_padded_to_whole_chunks():
    """3 and 32 channels of 4 bits are both one chunk of 16 bytes; 33 are two."""

    def seconds(channels: int) -> float:
        return expected(Matmul(rows=1 << 20, channels=channels, taps=9, outputs=128), "int4", RTX3090, fused_quantize=True).seconds

    assert seconds(3) == seconds(32) < seconds(33)


def test_faster_as_int8_names_what_4_bits_do_not_help():
    """A large convolution gains; one of 16 channels is read in the same chunks of 16 bytes at 8 bits, and computed in fewer steps at neither."""
    sites = {
        "large": SiteWork(channels=640, taps=9, outputs=640, inputs_at=4096, outputs_at=4096),
        "embedding": SiteWork(channels=16, taps=1, outputs=16, inputs_at=1, outputs_at=1),
    }
    assert faster_as_int8(sites, RTX3090, 8) == {"embedding"}
    assert faster_as_int8(sites, H200, 8) == {"large", "embedding"}


def test_the_parts_sum_to_the_whole_and_the_largest_bounds():
    found = expected(SD15_64, "float16", RTX3090)
    assert found.seconds == sum(found.parts.values())
    assert found.bound == "tensor cores" == max(found.parts, key=found.parts.get)

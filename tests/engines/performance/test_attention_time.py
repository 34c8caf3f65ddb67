import tomllib

import pytest

from engines.performance.attention_time import SOFTMAX_CYCLES, attention_s8_seconds, attention_seconds
from engines.performance.gpus import TABLE, Gpu, gpu_named, launch_seconds

MEASURED = tomllib.loads((TABLE.parent / "measured.toml").read_text())
GPU = gpu_named("rtx3090")


@pytest.mark.parametrize(("width", "padded"), [(40, 64), (64, 64), (72, 96), (80, 96), (160, 192)])
def test_attention_computes_the_head_dimension_that_its_kernel_has(width, padded):
    shape = (2, 41, 4096, width)  # 2624 tiles, 32 for each multiprocessor
    cycles = 4 * padded / 512 + SOFTMAX_CYCLES
    assert attention_seconds(shape, shape, GPU) == pytest.approx(32 * 128 * 4096 * cycles / GPU.clock)


@pytest.mark.parametrize("point", MEASURED["attention"], ids=lambda point: point["source"][:24])
def test_attention_is_as_far_from_each_measured_point_as_the_file_says(point):
    shape = (point["shape"]["batch"], point["shape"]["heads"], point["shape"]["length"], point["shape"]["width"])
    figures = point["gpu"]
    gpu = Gpu(
        name="", title="", sm="sm_86", sms=figures["sms"], clock=figures["clock_mhz"] * 1e6, dram=1, l2=1, l2_size=1,
        ops={"float16": figures["float16"]},
    )  # fmt: skip
    operations = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
    error = operations / attention_seconds(shape, shape, gpu) / 1e12 / point["tops"] - 1
    assert error == pytest.approx(point["error"], abs=0.015)


@pytest.mark.parametrize(
    ("width", "codes", "padded", "queries"), [(40, 64, 48, 128), (72, 96, 80, 128), (128, 128, 128, 64), (160, 160, 160, 64)]
)
def test_ours_pads_codes_to_32_and_values_to_16(width, codes, padded, queries):
    """Products and softmax of 41 heads of two samples; keys of 5.4 MB and more do not fit into half of 6 MB of L2: they are read twice, and their codes written."""
    shape = (2, 41, 4096, width)
    cycles = 2 * codes / 2048 + 2 * padded / 512 + SOFTMAX_CYCLES + 2 / 128
    keys = 82 * 4096 * (4 * width + codes + 4) / GPU.dram
    found = attention_s8_seconds(shape, shape, GPU)
    assert found == pytest.approx(82 * 4096 // queries // 82 * queries * 4096 * cycles / GPU.clock + keys)
    assert found < attention_seconds(shape, shape, GPU)


def test_a_text_of_77_tokens_gains_nothing():
    """Two stages of 64 keys for 77 of them, and two launches more: that is why it stays torch's. Attention of the map to itself gains."""
    launch = launch_seconds(graph=True)
    for heads, width in ((8, 40), (10, 64)):
        query, key = (2, heads, 4096, width), (2, heads, 77, width)
        assert attention_s8_seconds(query, key, GPU) + 3 * launch > attention_seconds(query, key, GPU) + launch
        assert attention_s8_seconds(query, query, GPU) < 0.75 * attention_seconds(query, query, GPU)

"""What is measured, what is printed, and what is refused. Times are made up here; only a GPU has real ones."""

import json

import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy_tools import bench_kernels
from edm_deploy_tools.bench_kernels import L2, LEAST_REPLAYS, Row, batches_of, chosen, main, show, summary, words
from edm_deploy_tools.layer_shapes import BATCHES, LAYERS

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def row(layer: str, float16: float, int8: float, *, batch: int = 2, uses: int = 1, int4: float | None = None) -> Row:
    times = {"float16": float16, "int_mm": None, "int8": int8, "int4": int4, "quantize8": 5.0, "quantize4": 4.0}
    return Row(model="sd15", batch=batch, layer=layer, uses=uses, quantize_share=0.75, **times)


ROWS = [row("a", 30, 10), row("b", 20, 20, uses=3), row("c", 40, 20), row("a", 90, 30, batch=8)]


def test_each_model_is_measured_at_its_own_batches():
    assert {(model, batch) for model, batch, _ in chosen(list(LAYERS), [])} == {(m, b) for m in LAYERS for b in BATCHES[m]}
    assert {batch for _, batch, _ in chosen(["sdxl"], [1, 4])} == {1, 4}
    assert len(chosen(["sd15"], [2])) == len(LAYERS["sd15"])


def test_a_summary_has_medians_and_the_slowest_layer():
    first, second = summary(ROWS)
    assert (first["model"], first["batch"], first["layers"]) == ("sd15", 2, 3)
    assert first["median speedup"] == 2.0  # of 3, 1 and 2
    assert first["with quantize"] == 1.6  # of 30/15, 20/25 and 40/25
    assert first["all uses, with quantize"] == (30 + 3 * 20 + 40) / (15 + 3 * 25 + 25)
    assert first["slowest"] == "1.00 b"
    assert (second["batch"], second["median speedup"]) == (8, 3.0)


def test_a_row_is_printed_with_its_speedups():
    printed = words(row("a", 30, 10))
    assert (printed["speedup"], printed["with quantize"], printed["quantize_share"]) == (3.0, 2.0, "75%")


def test_where_int4_is_emulated_its_time_is_left_out(capsys):
    show({"gpu": "H200"}, ROWS, as_json=False)
    said = capsys.readouterr().out
    assert "This GPU emulates 4-bit products: their bits were checked, their time says nothing." in said
    assert "INT8 against float16" in said
    show({"gpu": "RTX 3090"}, [row("a", 30, 10, int4=6)], as_json=False)
    assert "emulates" not in capsys.readouterr().out


def test_json_is_whole_and_alone(capsys):
    show({"gpu": "H200"}, ROWS, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["conditions"] == {"gpu": "H200"}
    assert [len(content["summary"]), len(content["rows"])] == [2, 4]
    assert content["rows"][0]["int4"] is None


@no_gpu
def test_without_a_gpu_it_ends_in_one_line(capfd):
    assert main([]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("Error: These kernels run on an NVIDIA GPU, and none can be used here.")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("models", "batch", "message"),
    [
        (["sd16"], "", "No layers of 'sd16' are listed. Known: reference, ldm4-imagenet, sd15, sdxl."),
        (["sd15"], "0", "--batch 0: expected 1 or more."),
        (["sd15"], "2,many", "--batch 2,many: expected whole numbers with commas, such as 2,8,16."),
    ],
)
def test_what_cannot_be_measured_is_refused(models, batch, message):
    with pytest.raises(InputError, match=message):
        chosen(models, batches_of(batch))


def test_too_few_replays_are_refused(capfd):
    assert main(["--replays", "3"]) == 2
    assert "--replays" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_reference_model_s_layers_are_right_and_timed():
    bandwidth, rows = bench_kernels.bench(chosen(["reference"], [2]), l2=L2.WARM, replays=LEAST_REPLAYS)
    assert bandwidth > 1e10
    assert len(rows) == len(LAYERS["reference"])
    assert all(one.int8 > 0 and one.float16 > 0 for one in rows)

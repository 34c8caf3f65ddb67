"""What is measured, printed and refused. Times are invented here; real ones need a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy_tools import bench_kernels
from edm_deploy_tools.bench_kernels import L2, LEAST_REPLAYS, LayerTiming, batches_of, chosen, main, show, summary, words
from edm_deploy_tools.benchmarks.layer_shapes import BATCHES, LAYERS, Layer

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def row(layer: str, float16: float, int8: float, *, batch: int = 2, uses: int = 1, int4: float | None = None) -> LayerTiming:
    times = {"float16": float16, "int_mm": None, "int8": int8, "int4": int4, "quantize8": 5.0, "quantize4": 4.0}
    return LayerTiming(model="sd15", batch=batch, layer=layer, uses=uses, quantize_share=0.75, **times)


ROWS = [row("a", 30, 10), row("b", 20, 20, uses=3), row("c", 40, 20), row("a", 90, 30, batch=8)]


def test_each_model_is_measured_at_the_batches_of_its_table():
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
    assert first["INT4"] is None
    assert summary([row("a", 30, 10, int4=6), row("b", 30, 10, int4=5)])[0]["INT4"] == 5.5
    assert (second["batch"], second["median speedup"]) == (8, 3.0)


def test_a_row_is_printed_with_its_speedups():
    printed = words(row("a", 30, 10))
    assert (printed["speedup"], printed["with quantize"], printed["quantize_share"]) == (3.0, 2.0, "75%")


@pytest.mark.parametrize(("capability", "has_int4"), [((8, 6), True), ((9, 0), False)])
def test_a_layer_is_checked_then_timed_on_copies_beyond_l2(capability, has_int4, monkeypatch):
    """On the CPU, with as many seconds as there are copies. L2 has 1000 bytes, so the copies have 3000 in total."""
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    shapes = []

    def graph_seconds(calls, replays):
        shapes.append(tuple(calls[0]().shape))
        return float(len(calls))

    monkeypatch.setattr(bench_kernels, "graph_seconds", graph_seconds)
    layer = Layer("linear", 32, 16, 10, 1, 1, 1, 7)
    timed = bench_kernels.bench_layer("sd15", 2, layer, torch.device("cpu"), 1e9, L2.COLD, LEAST_REPLAYS)
    assert (timed.model, timed.batch, timed.layer, timed.uses) == ("sd15", 2, "linear 32->16, 10 tokens", 7)
    # Bytes: codes 2 * 10 * 32 and weight 16 * 32 of 8 bits; half of that of 4; x 2 * 10 * 32 * 2 and the codes; float16 twice the codes and weight.
    assert timed.int8 == 3e6  # ceil(3000 / 1152)
    assert timed.int4 == (6e6 if has_int4 else None)
    assert timed.quantize8 == 2e6  # ceil(3000 / 1920)
    assert timed.float16 == 2e6
    assert timed.int_mm == 3e6
    assert timed.quantize_share == pytest.approx(1920 / 2.0 / 1e9)
    assert set(shapes) == {(2, 10, 1, 32), (2, 10, 1, 16), (2, 10, 16), (20, 16)}
    warm = bench_kernels.bench_layer("sd15", 2, layer, torch.device("cpu"), 1e9, L2.WARM, LEAST_REPLAYS)
    assert warm.int8 == warm.float16 == 1e6


def test_the_time_of_emulated_int4_is_omitted(capsys):
    show({"gpu": "H200"}, ROWS, as_json=False)
    printed = capsys.readouterr().out
    assert "This GPU emulates 4-bit products: their results were checked, and their time is not meaningful." in printed
    assert "Speedup over float16" in printed
    show({"gpu": "RTX 3090"}, [row("a", 30, 10, int4=6)], as_json=False)
    assert "emulates" not in capsys.readouterr().out


def test_the_json_is_complete(capsys):
    show({"gpu": "H200"}, ROWS, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["conditions"] == {"gpu": "H200"}
    assert [len(content["summary"]), len(content["rows"])] == [2, 4]
    assert content["rows"][0]["int4"] is None


@no_gpu
def test_without_a_gpu_it_ends_in_one_line(capfd):
    assert main([]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: These kernels run on an NVIDIA GPU, and none can be used here.")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("models", "batch", "message"),
    [
        (["sd16"], "", "No layers of 'sd16' are listed. Known: reference, ldm4-imagenet, sd15, sdxl."),
        (["sd15"], "0", "--batch 0: expected 1 or more."),
        (["sd15"], "2,many", "--batch 2,many: expected whole numbers separated by commas, such as 2,8,16."),
    ],
)
def test_an_invalid_request_is_refused(models, batch, message):
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

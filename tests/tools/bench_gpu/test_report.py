import tomllib

from edm_deploy_tools.bench_gpu.report import measured_toml, page, summary, write

LAYER = {"layer": "conv", "float16 of expected": 1.1, "int8 of expected": 1.5, "ours with quantize, over float16": 2.0}
SLOW = {"layer": "linear", "float16 of expected": 0.9, "int8 of expected": 2.5, "ours with quantize, over float16": 0.5}
SHAPE = {"rows": 1000, "channels": 100, "taps": 9, "outputs": 50}
RESULTS = {
    "versions": {"facts": {"gpu": "NVIDIA X"}, "tables": {}, "problems": [], "points": [], "seconds": 1.0},
    "kernels": {"error": "exit code -11. fault", "problems": []},
    "layers": {
        "facts": {},
        "problems": ["odd"],
        "tables": {"Layers": [LAYER, SLOW]},
        "points": [{"precision": "int8", "shape": SHAPE, "seconds": 2e-6, "expected": 1e-6}],
    },
    "model": {
        "facts": {},
        "problems": [],
        "points": [],
        "tables": {"One step": [{"way": "ours", "ms": 10.0}, {"way": "torch eager", "ms": 25.0}]},
    },
}


def test_the_summary_says_what_failed_what_was_faster_and_where_the_roofline_was_wrong():
    assert summary(RESULTS) == [
        "Stage kernels failed: exit code -11. fault",
        "odd",
        "1 of 2 layers are faster than float16, quantization included; most: conv, 2.0x.",
        "1 of 2 layers are slower than float16, quantization included; most: linear, 0.5x.",
        "float16 layers take 1.00 times what the roofline expects (median; 0.90 to 1.10).",
        "int8 layers take 2.00 times what the roofline expects (median; 1.50 to 2.50).",
        "A whole step: ours 10.0 ms, torch eager 25.0 ms: 2.50x.",
    ]
    assert summary({}) == ["Nothing was measured."]


def test_the_page_has_every_stage_and_table():
    text = page(RESULTS)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## versions, 1.0 s",
        "## kernels, 0.0 s",
        "## layers, 0.0 s",
        "## model, 0.0 s",
    ]
    assert "Failed: exit code -11. fault" in text
    assert "| ours | 10.0 |" in text


def test_points_have_their_rate_and_the_models_error(tmp_path):
    """2 * 1000 * 900 * 50 operations in 2 us are 45 T a second; half of the expected rate, so the model is 100 % too fast."""
    (point,) = tomllib.loads(measured_toml(RESULTS["layers"]["points"], "X"))["bench"]
    assert (point["tops"], point["error"], point["shape"]) == (45, 1.0, SHAPE)
    write(tmp_path, RESULTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["measured.toml", "results.json", "results.md"]
    assert 'gpu = "NVIDIA X"' in (tmp_path / "measured.toml").read_text()

from __future__ import annotations


def test_build_prints_the_plan(run, chain, tmp_path):
    ran = run("build-engine", chain.onnx, "--out", tmp_path / "engine", "--backend", "ort")
    assert ran.code == 0
    assert "Plan: " in ran.out
    assert "stored W8A8" in ran.out

from __future__ import annotations


def test_the_command_prints_the_table(in_process, run, tiny_model_dir, tmp_path):
    small = ["--recipes", "static", "--bits", "W8A8", "--rows", "2", "--samples", "2", "--steps", "2", "--budget", "30s"]
    ran = run("compare", tiny_model_dir, "--out", tmp_path / "compared", *small)
    assert ran.code == 0
    assert "static (no training)" in ran.out
    assert "report.html" in ran.out
    assert "5 weeks" in run("compare", tiny_model_dir, "--out", tmp_path / "other", "--budget", "5 weeks").complaint

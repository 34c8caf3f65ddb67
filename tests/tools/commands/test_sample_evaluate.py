from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++", "euler", "unipc", "ddpm"])
def test_sample_accepts_any_scheduler(run, chain, tmp_path, scheduler):
    ran = run("sample", chain.engine, "--out", tmp_path / "images", "--num-images", 3, "--steps", 3, "--scheduler", scheduler)
    assert ran.code == 0, ran.err
    assert "s per image" in ran.out
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000.png", "001.png", "002.png", "grid.png"]
    assert Image.open(tmp_path / "images" / "000.png").size == (8, 8)


def test_the_same_seed_gives_the_same_images(run, chain, tmp_path):
    for name in ("a", "b"):
        assert run("sample", chain.engine, "--out", tmp_path / name, "--num-images", 2, "--steps", 2, "--seed", 7).code == 0
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()


def test_evaluate_prints_the_error_and_its_conditions(run, chain, tmp_path):
    ran = run("evaluate", chain.artifact, "--out", tmp_path / "report", "--samples", 2, "--steps", 2)
    assert ran.code == 0, ran.err
    assert "noise error" in ran.out
    assert "2 samples, 2 steps of DDIM (eta 0), seed 123. PSNR of the samples, clamped to [-1, 1]." in ran.out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.html"}


def test_figures_that_are_not_finite_are_null_in_strict_json(run, chain, tmp_path, monkeypatch):
    monkeypatch.setattr("edm_deploy_tools.evaluation.trajectory_error.relative_error", lambda actual, expected: float("nan"))
    ran = run("evaluate", chain.artifact, "--out", tmp_path / "report", "--samples", 2, "--steps", 2, "--json")
    assert ran.code == 0, ran.err
    for text in (ran.out, (tmp_path / "report" / "report.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail)["results"][0]["noise_error"] is None


def test_sampling_and_evaluation_need_no_calibration_package():
    code = "import sys; sys.modules['calibration'] = None; import edm_deploy_tools.images.sample, edm_deploy_tools.evaluation.evaluate"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""

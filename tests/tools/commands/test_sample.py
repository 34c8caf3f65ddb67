from __future__ import annotations

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


def test_sampling_and_evaluation_need_no_calibration_package():
    code = "import sys; sys.modules['calibration'] = None; import edm_deploy_tools.images.sample, edm_deploy_tools.evaluation.evaluate"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""

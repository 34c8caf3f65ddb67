"""The stages as processes of their own, on the operators' CPU twins. What only a GPU can show are the times."""

import json
import tomllib

import pytest
import torch

from edm_deploy_tools.bench_gpu import __main__ as bench_gpu
from edm_deploy_tools.bench_gpu.__main__ import LIMITS, app, run_stage, update_profile
from edm_deploy_tools.bench_gpu.stage import StageRun
from edm_deploy_tools.common import run_app
from engines.performance.gpus import gpu_named

DRY = ["--device", "cpu", "--small"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_a_stage_that_dies_leaves_the_others_and_the_page(tmp_path, monkeypatch, capfd):
    """`kernels` ends as a GPU's fault would end it, `operators` does not end, `versions` runs; the page is written after each."""
    commands = []
    real = bench_gpu.tied

    def tied(command):
        commands.append(command)
        stage = command[command.index("--stage") + 1]
        if stage == "kernels":
            return ["sh", "-c", "echo 'CUDA error: an illegal memory access' >&2; kill -SEGV $$"]
        return ["sleep", "60"] if stage == "operators" else real(command)

    monkeypatch.setattr(bench_gpu, "tied", tied)
    monkeypatch.setattr(bench_gpu, "LIMITS", {**LIMITS, "operators": 1})
    assert run_app.run(app, "bench_gpu", ["--out", str(tmp_path / "out"), "--stages", "kernels,operators,versions", *DRY]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["kernels", "operators", "versions"]
    assert results["kernels"]["error"] == "exit code -11. CUDA error: an illegal memory access"
    assert results["operators"]["error"] == "not finished after 1 s"
    assert results["versions"]["facts"]["torch"] == torch.__version__
    page = (tmp_path / "out" / "results.md").read_text()
    assert "- Stage kernels failed: exit code -11" in page
    assert "## versions" in page
    assert "Stage operators failed" in capfd.readouterr().out
    assert all(command[-3:] == DRY for command in commands)


def test_all_stages_together_take_ten_minutes_at_most():
    assert sum(LIMITS.values()) <= 600


def test_measured_layers_replace_those_of_an_earlier_run(tmp_path):
    profile = tmp_path / "measured.toml"
    profile.write_text('[[point]]\ntops = 1\n\n# Measured by bench_gpu on a\n[[bench]]\ngpu = "a"\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "measured.toml").write_text('# Measured by bench_gpu on b\n[[bench]]\ngpu = "b"\n')
    update_profile(tmp_path / "out", profile)
    update_profile(tmp_path / "out", profile)
    assert tomllib.loads(profile.read_text()) == {"point": [{"tops": 1}], "bench": [{"gpu": "b"}]}


BAD = {
    "a stage": (["--stages", "kernels,speed"], "--stages speed: there is no such stage. Known: versions, kernels, sanitizer"),
    "a device": (["--device", "tpu"], "--device tpu: expected cuda or cpu"),
    "a GPU": (["--device", "cpu", "--gpu", "rtx9999"], "figures of GPU 'rtx9999' are not known"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, capfd):
    arguments, message = BAD[case]
    assert run_app.run(app, "bench_gpu", ["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@no_gpu
def test_without_a_gpu_the_dry_run_is_named(tmp_path, capfd):
    assert run_app.run(app, "bench_gpu", ["--out", str(tmp_path / "out")]) == 2
    assert "--device cpu --small" in capfd.readouterr().err


def test_every_stage_has_its_function():
    run = StageRun(device=torch.device("cpu"), gpu=gpu_named("rtx3090"), small=True)
    assert run_stage("sanitizer", run).facts["compute-sanitizer"] in ("not installed", "needs a GPU")

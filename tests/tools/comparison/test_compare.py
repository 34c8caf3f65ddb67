from __future__ import annotations

import json

import pytest

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy_tools.cli import main
from edm_deploy_tools.common.child_process import Measured
from edm_deploy_tools.comparison import compare as module
from edm_deploy_tools.comparison.compare import ComparisonRequest, compare
from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings

SMALL = "rows = 2\ncalibration_samples = 2\nsteps = 2\nbatch = 2\nrank = 2\n"


@pytest.fixture
def here(monkeypatch):
    """Cells are made in this process: a test of what is run, and in what order, need not load torch anew. Counts them."""
    ran = []

    def run(command, *, cwd):
        ran.append(command[command.index("--recipe") + 1])
        code = main(command[3:])
        return Measured(returncode=code, seconds=1.5, peak_bytes=10**6, last_line="Error: told." if code else "")

    monkeypatch.setattr(module, "run_measured", run)
    return ran


def asked(tmp_path, **changes):
    preset = tmp_path / "small.toml"
    preset.write_text(SMALL)
    given = {"recipes": "static,efficientdm", "bits": "W4A4", "budget": 20.0, "rows": 2, "setup": EvaluationSettings(samples=2, steps=2)}
    given |= {"presets": {"efficientdm": str(preset)}} if "efficientdm" in changes.get("recipes", given["recipes"]) else {}
    return ComparisonRequest(**given | changes)


def test_a_comparison_leaves_figures_a_table_and_a_page_and_goes_on_where_it_was(here, tiny_model_dir, tmp_path):
    out, lines = tmp_path / "compared", []
    results = compare(str(tiny_model_dir), out, asked(tmp_path, budget=6.0), say=lines.append)
    assert here == ["static", "efficientdm"]
    static, tuned = results["cells"]
    assert json.loads((out / "results.json").read_text())["cells"] == [static, tuned]
    for cell in (static, tuned):
        assert cell["noise_error"] > 0
        assert cell["frechet"] >= 0
        assert len(cell["noise_error_by_step"]) == 2
        assert cell["integer_share"] == 1.0  # every layer of this model is quantized
        assert (cell["seconds"], cell["peak_bytes"]) == (1.5, 10**6)
    assert tuned["steps_done"] >= 1
    assert static["steps_done"] is None
    assert "| 1 | " in (out / "table.md").read_text()
    assert (out / "report.html").read_text().count("data:image/png") == 3

    # The same again makes nothing; another scheme makes only what is new; a cell that lost its record is made again.
    assert compare(str(tiny_model_dir), out, asked(tmp_path, budget=6.0))["cells"] == [static, tuned]
    assert here == ["static", "efficientdm"]
    compare(str(tiny_model_dir), out, asked(tmp_path, recipes="static", bits="W4A4,W8A8"))
    assert here == ["static", "efficientdm", "static"]
    (out / static["folder"] / "made.json").unlink()
    compare(str(tiny_model_dir), out, asked(tmp_path, recipes="static"))
    assert here == ["static", "efficientdm", "static", "static"]


def test_ctrl_c_in_one_cell_leaves_the_others_valid(here, tiny_model_dir, tmp_path, monkeypatch):
    out, make = tmp_path / "compared", module.run_measured

    def pressed(command, *, cwd):
        if "mse" in command:
            raise KeyboardInterrupt
        return make(command, cwd=cwd)

    monkeypatch.setattr(module, "run_measured", pressed)
    with pytest.raises(KeyboardInterrupt):
        compare(str(tiny_model_dir), out, asked(tmp_path, recipes="static,mse"))
    assert [cell["recipe"] for cell in json.loads((out / "results.json").read_text())["cells"]] == ["static"]
    monkeypatch.setattr(module, "run_measured", make)
    results = compare(str(tiny_model_dir), out, asked(tmp_path, recipes="static,mse"))
    assert here == ["static", "mse"]
    assert all("failed" not in cell for cell in results["cells"])


def test_a_cell_that_fails_is_told_and_the_others_stand(here, tiny_model_dir, tmp_path, monkeypatch):
    def fail(command, *, cwd):
        return Measured(returncode=2, seconds=0.1, peak_bytes=0, last_line="Error: The budget leaves no step to train.")

    monkeypatch.setattr(module, "run_measured", fail)
    results = compare(str(tiny_model_dir), tmp_path / "compared", asked(tmp_path, recipes="static"))
    assert results["cells"][0]["failed"] == "The budget leaves no step to train."
    assert "- static at W4A4: The budget leaves no step to train." in (tmp_path / "compared" / "table.md").read_text()


def test_one_sample_is_refused_and_so_is_a_directory_of_something_else(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match="--samples 1: a Frechet distance needs at least 2"):
        compare(str(tiny_model_dir), tmp_path / "compared", asked(tmp_path, setup=EvaluationSettings(samples=1)))
    with pytest.raises(ArtifactError, match="holds other files"):
        compare(str(tiny_model_dir), tmp_path, asked(tmp_path))
    assert not (tmp_path / "compared").exists()


def test_prompts_for_a_model_that_takes_none_are_refused_before_anything_is_made(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match="without text encoders"):
        compare(str(tiny_model_dir), tmp_path / "compared", asked(tmp_path, setup=EvaluationSettings(samples=2, prompts=("a car",))))
    (tmp_path / "prompts.txt").write_text("a car\n")
    for given, message in (("prompts.txt", "without text encoders"), ("none.txt", "cannot be read")):
        with pytest.raises(InputError, match=message):
            compare(str(tiny_model_dir), tmp_path / "compared", asked(tmp_path, prompts=tmp_path / given))
    assert not (tmp_path / "compared").exists()


def test_integer_work_counts_multiply_accumulates_and_timesteps(chain):
    from dataclasses import replace

    import torch

    from edm_deploy.artifact.artifact import Artifact

    artifact = Artifact.load(chain.artifact)
    assert module.integer_share(artifact, [999.0, 0.0]) == 1.0
    name = next(iter(artifact.sites))
    floating = artifact.sites | {name: replace(artifact.sites[name], activation=None)}
    assert 0 < module.integer_share(replace(artifact, sites=floating), [0.0]) < 1
    relaxed = torch.zeros(artifact.num_train_timesteps, dtype=torch.uint8)
    relaxed[500:] = 1
    assert module.integer_share(replace(artifact, relaxed=relaxed), [999.0, 749.0, 499.0, 0.0]) == 0.5


def test_the_command_prints_the_table(here, run, tiny_model_dir, tmp_path):
    small = ["--recipes", "static", "--bits", "W8A8", "--rows", "2", "--samples", "2", "--steps", "2", "--budget", "30s"]
    ran = run("compare", tiny_model_dir, "--out", tmp_path / "compared", *small)
    assert ran.code == 0
    assert "static (no training)" in ran.out
    assert "report.html" in ran.out
    assert "5 weeks" in run("compare", tiny_model_dir, "--out", tmp_path / "other", "--budget", "5 weeks").complaint

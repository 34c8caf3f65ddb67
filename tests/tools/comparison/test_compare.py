from __future__ import annotations

import json

import pytest

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy_tools.common.child_process import Measured
from edm_deploy_tools.comparison import compare as module
from edm_deploy_tools.comparison.compare import ComparisonRequest, compare_recipes
from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings

SMALL = "rows = 2\ncalibration_samples = 2\nsteps = 2\nbatch = 2\nrank = 2\n"


def request_of(tmp_path, **changes):
    preset = tmp_path / "small.toml"
    preset.write_text(SMALL)
    fields = {
        "recipes": "static,efficientdm",
        "bits": "W4A4",
        "budget": 20.0,
        "rows": 2,
        "settings": EvaluationSettings(samples=2, steps=2),
    }
    fields |= {"presets": {"efficientdm": str(preset)}} if "efficientdm" in changes.get("recipes", fields["recipes"]) else {}
    return ComparisonRequest(**fields | changes)


def test_a_comparison_writes_figures_a_table_and_a_page_and_keeps_what_is_complete(in_process, tiny_model_dir, tmp_path):
    out, lines = tmp_path / "compared", []
    results = compare_recipes(str(tiny_model_dir), out, request_of(tmp_path, budget=6.0), notify=lines.append)
    assert in_process == ["static", "efficientdm"]
    static, tuned = results["cells"]
    assert json.loads((out / "results.json").read_text())["cells"] == [static, tuned]
    for cell in (static, tuned):
        assert cell["noise_error"] > 0
        assert cell["frechet"] >= 0
        assert len(cell["noise_error_by_step"]) == 2
        assert 0 <= cell["int4_share"] < cell["integer_share"]  # first and last layer are W8A8
        assert cell["integer_share"] == 1.0  # every layer of this model is quantized
        assert (cell["seconds"], cell["peak_bytes"]) == (1.5, 10**6)
    assert tuned["steps_done"] >= 1
    assert static["steps_done"] is None
    assert "| 1 | " in (out / "table.md").read_text()
    assert (out / "report.html").read_text().count("data:image/png") == 3

    # The same request runs nothing; another scheme runs only the new experiment; one that lost its record is run again.
    assert compare_recipes(str(tiny_model_dir), out, request_of(tmp_path, budget=6.0))["cells"] == [static, tuned]
    assert in_process == ["static", "efficientdm"]
    compare_recipes(str(tiny_model_dir), out, request_of(tmp_path, recipes="static", bits="W4A4,W8A8"))
    assert in_process == ["static", "efficientdm", "static"]
    (out / static["folder"] / "made.json").unlink()
    compare_recipes(str(tiny_model_dir), out, request_of(tmp_path, recipes="static"))
    assert in_process == ["static", "efficientdm", "static", "static"]


def test_ctrl_c_in_one_experiment_keeps_the_others(in_process, tiny_model_dir, tmp_path, monkeypatch):
    out, make = tmp_path / "compared", module.run_measured

    def pressed(command, *, cwd):
        if "mse" in command:
            raise KeyboardInterrupt
        return make(command, cwd=cwd)

    monkeypatch.setattr(module, "run_measured", pressed)
    with pytest.raises(KeyboardInterrupt):
        compare_recipes(str(tiny_model_dir), out, request_of(tmp_path, recipes="static,mse"))
    assert [cell["recipe"] for cell in json.loads((out / "results.json").read_text())["cells"]] == ["static"]
    monkeypatch.setattr(module, "run_measured", make)
    results = compare_recipes(str(tiny_model_dir), out, request_of(tmp_path, recipes="static,mse"))
    assert in_process == ["static", "mse"]
    assert all("failed" not in cell for cell in results["cells"])


def test_a_failed_experiment_is_reported_with_its_reason(in_process, tiny_model_dir, tmp_path, monkeypatch):
    def fail(command, *, cwd):
        return Measured(returncode=2, seconds=0.1, peak_bytes=0, last_line="Error: The budget leaves no step to train.")

    monkeypatch.setattr(module, "run_measured", fail)
    results = compare_recipes(str(tiny_model_dir), tmp_path / "compared", request_of(tmp_path, recipes="static"))
    assert results["cells"][0]["failed"] == "The budget leaves no step to train."
    assert "- static at W4A4: The budget leaves no step to train." in (tmp_path / "compared" / "table.md").read_text()


def test_one_sample_and_a_directory_with_other_files_are_refused(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match="--samples 1: a Frechet distance needs at least 2"):
        compare_recipes(str(tiny_model_dir), tmp_path / "compared", request_of(tmp_path, settings=EvaluationSettings(samples=1)))
    with pytest.raises(ArtifactError, match="holds other files"):
        compare_recipes(str(tiny_model_dir), tmp_path, request_of(tmp_path))
    assert not (tmp_path / "compared").exists()


def test_prompts_for_a_model_that_takes_none_are_refused_before_anything_is_run(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match="without text encoders"):
        compare_recipes(
            str(tiny_model_dir), tmp_path / "compared", request_of(tmp_path, settings=EvaluationSettings(samples=2, prompts=("a car",)))
        )
    (tmp_path / "prompts.txt").write_text("a car\n")
    for given, message in (("prompts.txt", "without text encoders"), ("none.txt", "cannot be read")):
        with pytest.raises(InputError, match=message):
            compare_recipes(str(tiny_model_dir), tmp_path / "compared", request_of(tmp_path, prompts=tmp_path / given))
    assert not (tmp_path / "compared").exists()


def test_engines_are_evaluated_instead_of_the_reference_executor(in_process, tiny_model_dir, tmp_path):
    requests = [request_of(tmp_path, recipes="static", engine=engine) for engine in (None, "ort")]
    reference, engine = (compare_recipes(str(tiny_model_dir), tmp_path / "compared", request)["cells"][0] for request in requests)
    assert in_process == ["static"]  # the artifact is kept, its figures are measured again
    assert (reference["engine"], engine["engine"]) == (None, "ort")
    assert engine["noise_error"] == pytest.approx(reference["noise_error"], rel=0.3)
    assert engine["noise_error"] != reference["noise_error"]  # another order of sums
    text = (tmp_path / "compared" / "table.md").read_text()
    assert "in engines of ort" in text
    assert "--engine ort" in text

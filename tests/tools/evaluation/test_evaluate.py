from __future__ import annotations

import json
from pathlib import Path

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.evaluation.evaluate import evaluate_paths, open_targets, unique_labels
from edm_deploy_tools.evaluation.results import headline
from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings

SETTINGS = EvaluationSettings(samples=2, steps=3)


@pytest.fixture(scope="module")
def evaluated(chain, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "report"
    return evaluate_paths([chain.artifact, chain.engine], out, settings=SETTINGS), out


def test_the_reference_is_the_model_that_the_artifact_was_made_from(evaluated, chain):
    report, _ = evaluated
    assert report.reference.name == str(chain.model)


def test_an_engine_is_compared_with_the_artifact_that_is_given_too(evaluated):
    report, _ = evaluated
    artifact, engine = headline(report)
    assert engine["codes beyond a tie"] == 0
    assert artifact["codes beyond a tie"] is None
    # One tie may flip and cascade, so end to end only the size of the error is compared.
    assert 0.5 < engine["noise error"] / artifact["noise error"] < 2


def test_the_json_holds_all_figures_of_the_page(evaluated):
    report, out = evaluated
    content = json.loads((out / "report.json").read_text())
    artifact, engine = content["results"]
    assert len(artifact["noise_error_by_step"]) == len(content["setup"]["timesteps"]) == 3
    assert {site["site"] for site in artifact["sites"]} == set(report.results[0].target.artifact.sites)
    assert engine["agreement"]["beyond_a_tie"] == 0
    assert {"cpu", "cores"} <= set(content["machine"])
    assert "torch" in content["versions"]
    assert content["date"]


def test_the_page_needs_no_network_and_no_script(evaluated):
    _, out = evaluated
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") >= 4  # three image grids, the heat map and its scale


def test_a_report_of_an_engine_alone_states_why_it_was_not_compared(chain, tmp_path):
    report = evaluate_paths([chain.engine], tmp_path / "report", reference=str(chain.model), settings=SETTINGS)
    assert report.results[0].agreement is None
    assert "give the artifact" in report.results[0].notes[0]


def test_a_float_model_that_moved_is_an_error_that_names_the_option(chain, copy_of, tmp_path):
    artifact = copy_of(chain.artifact)
    path = artifact / "artifact.json"
    path.write_text(path.read_text().replace(str(chain.model), str(chain.model) + "-gone"))
    with pytest.raises(ArtifactError, match="--reference MODEL"):
        evaluate_paths([artifact], tmp_path / "report", settings=SETTINGS)


def test_labels_are_directory_names_unless_two_are_equal():
    assert unique_labels([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert unique_labels([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]


def test_a_report_does_not_replace_other_files(chain, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        evaluate_paths([chain.artifact], tmp_path, settings=SETTINGS)


def test_an_engine_is_linked_to_its_artifact_by_digest(chain):
    artifact, engine = open_targets([chain.artifact, chain.engine])
    assert engine.artifact is artifact.artifact
    assert (artifact.kind, engine.kind) == ("artifact", "engine")


def test_a_text_conditional_model_is_evaluated_guided_and_decoded(run, prompted, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a horse\n")
    options = ["--samples", 2, "--steps", 2, "--prompts", prompts, "--guidance", 3]
    ran = run("evaluate", prompted.artifact, prompted.engine, "--out", tmp_path / "report", *options)
    assert ran.code == 0, ran.err
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    settings = content["setup"]
    assert (settings["guidance"], settings["prompts"], settings["compared"]) == (3.0, ["a horse"], "decoded")
    assert settings["conditioning"].startswith("1 prompts, sha256")
    artifact, engine = content["results"]
    assert engine["agreement"]["beyond_a_tie"] == 0
    assert engine["agreement"]["codes"] > 0
    assert 0.5 < engine["noise_error"] / artifact["noise_error"] < 2  # a tie may cascade
    assert engine["bytes"] < sum(path.stat().st_size for path in prompted.engine.rglob("*.*")), "text encoder and VAE are not the engine's"
    assert "the images that the pipeline" in (tmp_path / "report" / "report.html").read_text()


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist; evaluate takes artifacts and engines"):
        open_targets([tmp_path / "none"])

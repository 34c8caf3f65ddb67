from __future__ import annotations

import json

import pytest


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


def test_metrics_of_the_images_are_in_the_table_and_the_report(run, chain, tmp_path):
    arguments = ("--out", tmp_path / "report", "--samples", 4, "--steps", 2, "--metrics", "fid,precision,recall")
    ran = run("evaluate", chain.artifact, *arguments, "--json")
    assert ran.code == 0, ran.err
    (result,) = json.loads(ran.out)["results"]
    assert set(result["metrics"]) == {"Frechet distance, features-cifar10", "precision, features-cifar10", "recall, features-cifar10"}
    assert "Frechet distance, features-cifar10" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics", "fid,lpips"), "--metrics has 'lpips'; expected some of fid, sfid, is, precision, recall"),
        (("--metrics", "sfid"), "--metrics sfid needs the Inception network"),
        (("--metrics", "is", "--inception", "w.safetensors"), "w.safetensors does not exist"),
        (("--inception", "w.safetensors"), "--inception and --images are for --metrics"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused_before_any_work(run, chain, tmp_path, arguments, message):
    complaint = run("evaluate", chain.artifact, "--out", tmp_path / "report", *arguments).complaint
    assert message in complaint

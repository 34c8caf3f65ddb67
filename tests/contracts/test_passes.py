"""What holds for every pass that the folder has, with a recipe that calibrates and one that trains: an artifact that exports and runs as the judge says."""

import functools
from dataclasses import fields

import pytest
import torch

import calibration
from calibration import passes
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.minmax import MinMax
from calibration.run.options import RunOptions
from edm_deploy import Artifact, load_denoiser, registry
from edm_deploy.artifact.reference import reference_with_correction
from edm_deploy.artifact.relaxed_timesteps import quantized_graph, relaxed_graph
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy_tools.evaluation.denoisers import denoise_of_artifact
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs
from engines import build_engine
from tests.calibration.tiny import tiny_source
from tests.conftest import check_no_further, tiny_inputs

NAMES = registry.names(passes)
RECIPES = {
    "minmax": MinMax(weight_bits=4, act_bits=4, rows=6, calibration_samples=2),
    "efficientdm": EfficientDM(rows=6, calibration_samples=2, steps=2, batch=3, rank=2),
}


def quick(name):
    """The pass with every count of work at its smallest."""
    chosen = registry.load(passes, name, "PASS")
    small = {"samples": 2, "held_out": 0.0, "probes": 2, "candidates": 9, "groups": 3}
    known = {field.name for field in fields(chosen)}
    return chosen(**{key: value for key, value in small.items() if key in known})


@pytest.fixture(scope="module")
def composed():
    """What passes make of a recipe: each alone, or all at once; each made once."""

    @functools.cache
    def made(recipe, name):
        chosen = [quick(own) for own in (NAMES if name == "all" else [name])]
        return calibration.fit(tiny_source(), RECIPES[recipe], RunOptions(), passes=chosen)

    return made


@pytest.mark.parametrize(("recipe", "name"), [*(("minmax", name) for name in NAMES), ("minmax", "all"), ("efficientdm", "all")])
def test_a_pass_ends_in_an_artifact_that_the_reference_runs(recipe, name, composed, tmp_path):
    artifact = composed(recipe, name)
    loaded = Artifact.load(artifact.save(tmp_path / "a"))
    assert loaded.digest == artifact.digest
    assert loaded.provenance["recipe"] == recipe
    assert set(loaded.provenance["passes"]) == set(NAMES if name == "all" else [name])
    assert all(set(settings) >= set(quick(own).settings()) for own, settings in loaded.provenance["passes"].items())
    assert reference_with_correction(loaded)(tiny_inputs("unet2d")).isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_passes_together_run_in_an_engine_as_the_judge_says(recipe, composed, tmp_path):
    pytest.importorskip("onnxruntime")
    artifact = composed(recipe, "all")
    onnx_from_artifact(artifact, tmp_path / "onnx")
    manifest = build_engine(tmp_path / "onnx", tmp_path / "engine", backend="ort")
    inputs = tiny_inputs("unet2d", batch=4)  # timesteps 0 to 999: some in either engine
    found = load_denoiser(tmp_path / "engine")(inputs["sample"], inputs["timestep"]).sample
    expected = reference_with_correction(artifact)(inputs)
    family = artifact.family_object
    exact = artifact.correction.around(lambda given: family.forward(tiny_source().model, given))(inputs)
    check_no_further(found, expected, exact)
    for number, part in enumerate((quantized_graph(artifact), relaxed_graph(artifact))):
        cut = cut_from_inputs(part, inputs, tmp_path / f"cut-{number}", dtype=torch.float32)
        sites = agreement(cut, manifest, device="cpu")
        assert {site.site for site in sites} == set(artifact.sites)
        assert [site.site for site in sites if site.differ] == []
        assert all(site.output_error <= 1e-4 for site in sites)


def test_what_a_tool_evaluates_is_what_the_runtime_does(composed):
    from edm_deploy.pipelines.guidance import Conditioning

    artifact, inputs = composed("minmax", "all"), tiny_inputs("unet2d")
    assert torch.equal(
        denoise_of_artifact(artifact, Conditioning())(inputs["sample"], inputs["timestep"]), reference_with_correction(artifact)(inputs)
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_default_settings_are_valid_and_documented(name):
    chosen = registry.load(passes, name, "PASS")
    chosen()
    documented = "".join(cls.__doc__ or "" for cls in chosen.__mro__)
    assert [field.name for field in fields(chosen) if field.name not in documented] == []
    assert chosen.name == name

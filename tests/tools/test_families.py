from __future__ import annotations

import ast
from pathlib import Path

import pytest

from edm_deploy import models, registry
from edm_deploy.models import family_named
from edm_deploy_tools.families import COMMAND, main, page, table
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
MODELS = "tests/edm_deploy/models/test_{}.py::"
SITES_IN_CONTRACTS = "tests/contracts/test_family_engines.py::test_at_every_site_the_codes_are_those_of_the_reference"
WITH_EVERY_SCHEDULER = "test_its_pipeline_comes_back_with_every_scheduler"
THROUGH_ENCODERS = "test_prompts_are_encoded_as_by_the_pipeline"
TAKES_NONE = "takes none"


def transformer(name: str, kind: str, *, pipeline: str = WITH_EVERY_SCHEDULER, prompts: bool = True) -> tuple[str, ...]:
    tests = MODELS.format(name)
    return kind, SITES_IN_CONTRACTS, tests + pipeline, tests + THROUGH_ENCODERS if prompts else TAKES_NONE


def variant() -> tuple[str, ...]:
    """A variant of the UNet with conditioning; its engine is compared with the reference as a whole, not site by site."""
    tests = MODELS.format("unet2d_condition")
    return tests + "test_it_is_fine_tuned", "", tests + WITH_EVERY_SCHEDULER, tests + THROUGH_ENCODERS


# README's table of what has run, with tiny random models: its rows, each with its kind in TINY, on which tests/contracts calibrate and
# fine-tune by every recipe (or a test that does), and the tests of an engine against the reference, of its pipeline around an engine, and of prompts. "" has not run.
COLUMNS = ("model", "calibrated, fine-tuned", "engines, site by site", "its pipeline around an engine", "prompts by its own encoders")
RAN: dict[str, tuple[str, ...]] = {
    "`UNet2DModel`": (
        "unet2d",
        "tests/contracts/test_backends.py::test_at_every_site_the_codes_are_those_of_the_reference",
        "tests/tools/images/test_sample.py::test_more_images_than_a_batch_are_sampled",
        TAKES_NONE,
    ),
    "`UNet2DConditionModel`: Stable Diffusion": (
        "unet2d-condition",
        "tests/tools/evaluation/test_evaluate.py::test_a_text_conditional_model_is_evaluated_guided_and_decoded",
        "tests/edm_deploy/pipelines/test_rebuild.py::test_a_pipeline_around_a_float_engine_is_the_original",
        "tests/edm_deploy/pipelines/test_prompt_encoding.py::test_prompts_are_encoded_as_by_the_pipeline",
    ),
    "`UNet2DConditionModel`: Stable Diffusion 2": variant(),
    "`UNet2DConditionModel`: SDXL": ("sdxl", SITES_IN_CONTRACTS, *variant()[2:]),
    "`UNet2DConditionModel`: inpainting": variant(),
    "`UNet2DConditionModel`: LDM-4, a label as token": (*variant()[:3], TAKES_NONE),
    "`DiTTransformer2DModel`": transformer("dit_transformer_2d", "dit", prompts=False),
    "`PixArtTransformer2DModel`": transformer("pixart_transformer_2d", "pixart"),
    "`SD3Transformer2DModel`": transformer("sd3_transformer_2d", "sd3"),
    "`FluxTransformer2DModel`": transformer("flux_transformer_2d", "flux", pipeline="test_its_pipeline_comes_back"),
}


def words(proof: str) -> str:
    return proof if proof == TAKES_NONE else "yes" if proof else "-"


def test_the_committed_page_is_current():
    assert (ROOT / "docs" / "families.md").read_text() == page(), f"run: {COMMAND}"


def test_every_family_has_its_section():
    text = (ROOT / "docs" / "families.md").read_text()
    for name in registry.names(models):
        assert f"\n## {family_named(name).class_name}\n" in text


def test_the_page_is_written_to_the_file_or_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("edm_deploy_tools.families.page", lambda: "a page\n")
    assert main([str(tmp_path / "p.md")]) == main([]) == 0
    assert (tmp_path / "p.md").read_text() == capsys.readouterr().out == "a page\n"


def test_the_table_of_the_readme_follows_the_tests():
    rows = [[label, *(words(proof) for proof in proofs)] for label, proofs in RAN.items()]
    assert table(COLUMNS, rows) in (ROOT / "README.md").read_text(), "README's table must be:\n" + table(COLUMNS, rows)


def test_the_readme_names_every_family_in_it():
    assert {family_named(name).class_name for name in registry.names(models)} == {label.split("`")[1] for label in RAN}


@pytest.mark.parametrize("label", RAN)
def test_each_claim_of_the_readme_has_a_test(label):
    calibrated = RAN[label][0]
    assert calibrated in TINY or "::" in calibrated or not calibrated
    for proof in RAN[label]:
        if "::" in proof:
            path, name = proof.split("::")
            tree = ast.parse((ROOT / path).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path} has no {name}"

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.inspection.describe import (
    describe,
    folded_words,
    guidance_words,
    kind_of,
    longest,
    pipeline_words,
)
from tests.conftest import artifact_by_hand
from tests.edm_deploy.test_older_artifacts import ARTIFACTS


def test_each_kind_is_known_by_its_marker_file(chain):
    for kind in ("model", "artifact", "onnx", "engine"):
        assert kind_of(str(getattr(chain, kind))) == kind
        assert describe(str(getattr(chain, kind))).kind == kind


def test_a_directory_of_other_files_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is no model, artifact, ONNX directory or engine"):
        kind_of(str(tmp_path))


def test_shares_of_the_work_sum_to_100(chain):
    rows = describe(str(chain.model)).tables["Sites"]
    assert sum(row["MACs %"] for row in rows) == pytest.approx(100, abs=0.5)  # each is rounded to 0.01
    assert {row["placement"] for row in rows} == {"quantize", "w8a8"}


def test_an_artifact_is_described_with_a_plan_for_every_backend(chain):
    description = describe(str(chain.artifact))
    assert {row["backend"] for row in description.tables["Plan"]} >= {"ort", "openvino", "trt-rtx", "trt"}
    assert description.facts["recipe"] == "minmax"


def test_an_engine_is_described_with_profile_and_plan(chain):
    facts = describe(str(chain.engine)).facts
    assert facts["backend"] == "ort"
    assert "batch 1:4:8" in facts["profile"]
    assert "stored W8A8" in facts["plan"]


def test_the_sites_with_the_most_work_are_printed_in_the_models_order():
    rows = [{"site": name, "MACs %": share} for name, share in (("a", 30.0), ("b", 10.0), ("c", 60.0))]
    title, kept = longest("Sites", rows, 2)
    assert [row["site"] for row in kept] == ["a", "c"]
    assert title == "Sites: the 2 with the most multiply-accumulates of 3; --json has all"
    assert longest("Sites", rows, 3) == ("Sites", rows)
    plans = [{"site": name, "stored": "W4A4"} for name in "abc"]
    assert longest("Sites", plans, 2) == ("Sites: the first 2 of 3; --json has all", plans[:2])
    assert longest("Plan", [{"backend": "ort"}, {"backend": "trt"}], 1)[0] == "Plan"


def test_the_conditioning_of_calibration_is_described(prompted, chain):
    facts = describe(str(prompted.artifact)).facts
    assert facts["guidance"] == "classifier-free, calibrated with 7.5, usually 7.5"
    assert re.fullmatch(r"2 prompts, sha256 [0-9a-f]{12}, for encoder_hidden_states", facts["conditioning"])
    facts = describe(str(chain.artifact)).facts
    assert facts["guidance"] == "none: the model is not guided"
    assert facts["conditioning"] == "none: the model is unconditional"
    assert facts["folded"] == "none"


def test_an_engine_is_described_with_where_its_other_components_are(run, prompted, chain, tmp_path):
    facts = describe(str(prompted.engine)).facts
    assert facts["pipeline"] == "StableDiffusionPipeline: text_encoder, tokenizer, vae are in this directory, which is complete"
    assert facts["guidance"] == "classifier-free, usually 7.5; each image takes two samples of a batch"
    assert describe(str(chain.engine)).facts["pipeline"] == "DDIMPipeline: scheduler and engine only"
    manifest = Manifest.read(prompted.engine, kind="engine")
    shutil.copy(prompted.engine / "model_index.json", tmp_path)
    assert pipeline_words(tmp_path, manifest) == (
        f"StableDiffusionPipeline: text_encoder, tokenizer, vae come from {prompted.model}; build with --with-pipeline to copy them"
    )
    (tmp_path / "model_index.json").unlink()
    assert pipeline_words(tmp_path, manifest).startswith("not recorded")


def test_folded_layers_are_described():
    assert folded_words(()) == "none"
    assert folded_words("abcd") == "4 layers that depend on the timestep alone, in floating point: a, b, c, ..."


def test_guidance_that_was_off_or_not_recorded_is_described():
    def words(**provenance):
        return guidance_words(replace(artifact_by_hand("dit"), provenance=provenance))

    assert words(guidance=1.0) == "classifier-free, calibrated with 1 (off), usually 4"
    assert words() == "classifier-free, usually 4; not recorded for this artifact"


def test_the_restructuring_of_an_artifact_is_described():
    facts = describe(str(ARTIFACTS / "schema3")).facts
    block = "transformer_blocks.0"
    assert facts["structure"] == (
        f"1 layers split: {block}.ff.net.2 into 6 + 10 channels; 1 inputs scaled by channel: {block}.attn1.to_out.0"
    )
    assert facts["bits by channel"] == "1 sites; channels: 3 of 4, 1 of 5 bits, 4.25 on average"
    plain = describe(str(ARTIFACTS / "schema1")).facts
    assert (plain["structure"], plain["bits by channel"]) == ("as published", "none")


def test_the_timestep_correction_of_an_artifact_is_described(artifact_w4a4, tmp_path):
    from dataclasses import replace

    import torch

    from edm_deploy.artifact.timestep_correction import Correction
    from edm_deploy.artifact.timestep_routing import mask_from_intervals

    correction = Correction(
        row_of_timestep=artifact_w4a4.row_of_timestep, scale=torch.full((5, 3), 1.25), input_bias=torch.full((5, 3), -0.5)
    )
    replace(artifact_w4a4, correction=correction, relaxed=mask_from_intervals([(0, 99)], 1000)).save(tmp_path / "a")
    facts = describe(str(tmp_path / "a")).facts
    assert facts["correction"] == "prediction times 1.2500 to 1.2500, sample shifted by up to 0.5000, 5 rows"
    assert facts["relaxed"].startswith("timesteps 0 to 99")

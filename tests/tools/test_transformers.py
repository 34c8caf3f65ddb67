"""The transformer families on the command line: valid use, and user errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from tests.edm_deploy.models.chain import home

KINDS = ["dit", "pixart", "sd3", "flux"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
FAST = ["--recipe", "minmax", "--rows", "2", "--set", "calibration_samples=2"]


def test_folded_time_reaches_every_kind_of_engine(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = [home("pixart"), "--prompts", tmp_path / "prompts.txt", *FAST]
    made = run("calibrate", *arguments, "--fold-time", "--out", tmp_path / "a")
    assert made.code == 0, made.err
    assert "3 layers depend on the timestep alone: they stay in floating point, and export replaces them by a table." in made.out
    assert Artifact.load(tmp_path / "a").provenance["conditioning"].startswith("1 prompts")
    exported = run("export", tmp_path / "a", "--out", tmp_path / "onnx")
    assert "3 layers that depend on the timestep alone became a table, 1000 timesteps x 112 features" in exported.out
    for backend, source in (("ort", "onnx"), ("cuda", "a")):
        assert run("build-engine", tmp_path / source, "--out", tmp_path / backend, "--backend", backend).code == 0
        assert not [site for site in Manifest.read(tmp_path / backend, kind="engine").plan if site.startswith("adaln_single")]


@pytest.mark.parametrize(
    ("kind", "beside"),
    [("dit", "the class label"), ("sd3", "the pooled prompt"), ("flux", "the pooled prompt with the guidance scale")],
)
def test_time_that_cannot_be_folded_is_refused_with_the_reason(kind, beside, run, tmp_path):
    prompts = () if kind == "dit" else ("--prompts", _prompts(tmp_path, "a cat"))
    ran = run("calibrate", home(kind), "--out", tmp_path / "a", *FAST, "--fold-time", *prompts)
    assert f"depends on the timestep alone: {beside} enters the embedding that every block uses. Leave it out." in ran.complaint
    assert not (tmp_path / "a").exists()


def test_image_tokens_have_their_profile(run, tmp_path):
    assert run("export", home("flux"), "--out", tmp_path / "onnx").code == 0
    options = ["--backend", "ort", "--tokens", "1:512:512"]
    assert run("build-engine", tmp_path / "onnx", "--out", tmp_path / "e", *options, "--image-tokens", "16:16:64").code == 0
    assert Manifest.read(tmp_path / "e", kind="engine").profile["image_tokens"] == ShapeRange(16, 16, 64)
    refused = run("build-engine", tmp_path / "onnx", "--out", tmp_path / "f", *options, "--image-tokens", "16-64")
    assert "--image-tokens 16-64: expected MIN:OPT:MAX" in refused.complaint


def _prompts(folder, text):
    (folder / "prompts.txt").write_text(text)
    return folder / "prompts.txt"


def quantized(pipeline, folder):
    config = pipeline / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    return []


def with_lora_beside(pipeline, folder):
    save_file({"transformer.lora_A.weight": torch.zeros(1)}, pipeline / "pytorch_lora_weights.safetensors")
    return []


def with_lora_inside(pipeline, folder):
    tensors = load_file(pipeline / "transformer" / WEIGHTS)
    save_file(tensors | {"proj_out.lora_A.weight": torch.zeros(1)}, pipeline / "transformer" / WEIGHTS)
    return []


def without_scheduler(pipeline, folder):
    index = json.loads((pipeline / "model_index.json").read_text())
    del index["scheduler"]
    (pipeline / "model_index.json").write_text(json.dumps(index))
    return []


def without_a_tensor(pipeline, folder):
    tensors = load_file(pipeline / "transformer" / WEIGHTS)
    del tensors[max(name for name in tensors if name.endswith("weight"))]
    save_file(tensors, pipeline / "transformer" / WEIGHTS)
    return []


def with_a_long_prompt(pipeline, folder):
    return ["--prompts", _prompts(folder, "a" * 700)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (quantized, r"is quantized already \(bitsandbytes\); expected float weights"),
        (with_lora_beside, r"pytorch_lora_weights.safetensors is a LoRA that is not fused into the model. Fuse it first"),
        (with_lora_inside, r"carries a LoRA that is not fused: it has a tensor 'proj_out.lora_A.weight'"),
        (without_scheduler, r"is a pipeline without a scheduler; a trajectory needs one"),
        (without_a_tensor, r"cannot be read as \w+Transformer2DModel: the files hold no '\w.*weight'"),
        (with_a_long_prompt, r"The prompt 'a+\.\.\.' has 70\d tokens; the text encoder takes \d+. Shorten it"),
    ],
)
def test_a_pipeline_that_cannot_be_quantized_is_one_clear_line(kind, spoil, message, run, copy_of, tmp_path):
    import re

    if kind == "dit" and spoil is with_a_long_prompt:
        pytest.skip("DiT takes labels, no prompts")
    pipeline = copy_of(home(kind))
    options = spoil(pipeline, tmp_path) or ["--prompts", _prompts(tmp_path, "a cat")]
    assert re.search(message, run("calibrate", pipeline, "--out", tmp_path / "a", *FAST, *options).complaint)
    assert not (tmp_path / "a").exists()

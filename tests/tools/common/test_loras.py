import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from edm_deploy import load_denoiser
from edm_deploy.errors import InputError
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.common.loras import file_and_weight
from tests.tiny_loras import peft_tensors


def test_a_file_has_weight_one_unless_it_says_otherwise():
    assert file_and_weight("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    assert file_and_weight("a/b:c.safetensors") == (Path("a/b:c.safetensors"), 1)
    assert file_and_weight("x:-1") == (Path("x"), -1)
    for bad in (":0.8", "x:nan", "x:1e9"):
        with pytest.raises(InputError, match=f"--lora {bad}: "):
            file_and_weight(bad)


@pytest.fixture(scope="module")
def exported(chain, tmp_path_factory):
    """An engine with rank slots, and a LoRA of rank 2 for it."""
    from edm_deploy_tools.cli import main

    root = tmp_path_factory.mktemp("lora")
    assert main(["export", str(chain.artifact), "--out", str(root / "onnx"), "--lora-rank", "2"]) == 0
    assert main(["build-engine", str(root / "onnx"), "--out", str(root / "engine"), "--backend", "ort", "--batch", "1:4:8"]) == 0
    with load_denoiser(root / "engine") as denoiser:
        shapes = denoiser.manifest.adapters.layers
    save_file(peft_tensors(shapes, rank=2), root / "style.safetensors")
    save_file(peft_tensors(shapes, rank=3), root / "wide.safetensors")
    save_file(peft_tensors({"nothing": (4, 4)}, rank=1), root / "unknown.safetensors")
    save_file(
        peft_tensors({name: (*shape[:1], shape[1] + 1, *shape[2:]) for name, shape in shapes.items()}, rank=1), root / "other.safetensors"
    )
    save_file({name: value * float("nan") for name, value in peft_tensors(shapes, rank=1).items()}, root / "nan.safetensors")
    (root / "damaged.safetensors").write_bytes((root / "style.safetensors").read_bytes()[:-40])
    return root


def sampled(run, engine, out, *options):
    ran = run("sample", engine, "--out", out, "--num-images", 2, "--steps", 2, *options)
    assert ran.code == 0, ran.err
    return (out / "grid.png").read_bytes()


def test_sample_takes_loras_and_an_engine_is_built_with_one_for_good(run, chain, exported, tmp_path):
    style = exported / "style.safetensors"
    plain = sampled(run, exported / "engine", tmp_path / "plain")
    assert sampled(run, exported / "engine", tmp_path / "off", "--lora", f"{style}:0") == plain
    assert sampled(run, exported / "engine", tmp_path / "on", "--lora", f"{style}:5") != plain
    built = run(
        "build-engine", chain.artifact, "--out", tmp_path / "fused", "--backend", "cuda", "--gpu", "rtx3090", "--lora", f"{style}:0.5"
    )
    assert built.code == 0, built.err
    fused = Manifest.read(tmp_path / "fused", kind="engine")  # what it computes: tests/edm_deploy/adapters/test_fuse.py
    assert set(fused.structure["branches"].values()) == {2} and fused.adapters is None


BAD = {
    "wide": r"wide.safetensors has rank 3; this engine has 2 rank slots. Export it again with --lora-rank 3",
    "unknown": r"unknown.safetensors has 'nothing.lora_A.weight' and 1 more, which names no layer of this UNet2DModel",
    "other": r"other.safetensors is for another base model: layer 'down_blocks",
    "nan": "nan.safetensors: layer 'down_blocks.* holds NaN or infinity",
    "damaged": "damaged.safetensors is no safetensors file",
    "missing": "missing.safetensors does not exist; expected a LoRA",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_lora_is_one_line_and_exit_code_2(run, exported, tmp_path, name):
    import re

    ran = run(
        "sample", exported / "engine", "--out", tmp_path / "x", "--num-images", 1, "--steps", 1, "--lora", exported / f"{name}.safetensors"
    )
    assert re.search(BAD[name], ran.complaint)
    assert not (tmp_path / "x").exists()


def test_other_misuse_is_one_line_too(run, chain, exported, tmp_path):
    style, out = exported / "style.safetensors", ("--out", tmp_path / "x")
    twice = run("sample", exported / "engine", *out, "--lora", style, "--lora", style)
    assert "ranks 2 + 2 = 4 together; this engine has 2 rank slots" in twice.complaint
    assert "built without rank slots" in run("sample", chain.engine, *out, "--lora", style).complaint
    assert "Add --lora-rank" in run("export", chain.artifact, *out, "--lora-layers", ".").complaint
    assert "Give --lora to edm-deploy export" in run("build-engine", chain.onnx, *out, "--backend", "ort", "--lora", style).complaint
    assert not (tmp_path / "x").exists()


def test_evaluate_adds_the_loras_to_the_float_model_too(run, chain, exported, tmp_path):
    errors = {}
    for lora in ((), ("--lora", f"{exported / 'style.safetensors'}:2")):
        ran = run(
            "evaluate",
            chain.artifact,
            exported / "engine",
            "--out",
            tmp_path / "x",
            "--samples",
            2,
            "--steps",
            2,
            "--overwrite",
            "--json",
            *lora,
        )
        assert ran.code == 0, ran.err
        content = json.loads(ran.out)
        errors[lora != ()] = [result["noise_error"] for result in content["results"]]
        assert [given["weight"] for given in content["setup"]["loras"]] == ([2.0] if lora else [])
    for plain, with_lora in zip(errors[False], errors[True], strict=True):
        assert with_lora != plain
        assert with_lora < 3 * plain  # on one side alone, this LoRA moves the prediction by more than its size

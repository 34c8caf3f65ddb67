"""A user error ends in one line that names the remedy, exit code 2, and no half-written output."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from edm_deploy.storage.directories import sha256_of

# Arguments, where {model}, {artifact}, {onnx}, {engine}, {empty}, {file}, {out} stand for paths, and a part of the message.
REFUSED = {
    "unknown command": ("calibrte {model} --out {out}", "Did you mean 'calibrate'"),
    "unknown option": ("calibrate {model} --out {out} --recip mse", "--recip"),
    "missing argument": ("calibrate --out {out}", "MODEL"),
    "number that is none": ("calibrate {model} --out {out} --rows many", "--rows"),
    "model that is not there": ("calibrate ./nothing --out {out}", "does not exist"),
    "directory that is no model": ("calibrate {empty} --out {out}", "no diffusers pipeline directory"),
    "unknown recipe": ("calibrate {model} --out {out} --recipe mes", "Did you mean 'mse'"),
    "unknown preset": ("calibrate {model} --out {out} --preset dem", "Did you mean 'demo'"),
    "unknown setting": ("finetune {model} --out {out} --set stps=3", "Did you mean 'steps'"),
    "setting without a value": ("finetune {model} --out {out} --set steps", "expected key=value"),
    "setting of the wrong type": ("finetune {model} --out {out} --set steps=many", "expected a whole number"),
    "setting outside its range": ("finetune {model} --out {out} --set steps=0", "at least 1"),
    "rotation that is no choice": ("calibrate {model} --out {out} --set rotate=on", "one of 'off', 'all', 'auto'"),
    "rotation in blocks of no power of two": (
        "calibrate {model} --out {out} --set rotate=all --set rotate_block=24",
        "expected a power of two",
    ),
    "rotation in blocks that do not divide": (
        "calibrate {model} --out {out} --set rotate=all --set rotate_block=32",
        "does not divide the 16 input channels",
    ),
    "config that is not there": ("finetune {model} --out {out} --config nothing.toml", "does not exist"),
    "config that is no TOML": ("finetune {model} --out {out} --config {file}", "cannot be read as TOML"),
    "weight bits out of range": ("calibrate {model} --out {out} --weight-bits 9", "expected 2 to 8"),
    "activation bits out of range": ("calibrate {model} --out {out} --act-bits 2", "expected 3 to 8"),
    "unknown target": ("finetune {model} --out {out} --for openvin", "Did you mean 'openvino'"),
    "scheme that the target cannot carry": ("calibrate {model} --out {out} --act-bits 16 --for trt-rtx", "Nearest: W8A8"),
    "out that holds something": ("calibrate {model} --out {artifact}", "exists and is not empty. Pass --overwrite"),
    "out that holds something else": ("calibrate {model} --out {model} --overwrite", "holds other files"),
    "provider that is not installed": ("build-engine {onnx} --out {out} --backend ort --provider tensorrt", "edm-deploy[ort-gpu]"),
    "provider of another backend": ("build-engine {onnx} --out {out} --backend openvino --provider cuda", "has no option --provider"),
    "CUDA graphs of several sizes": (
        "build-engine {onnx} --out {out} --backend ort --provider cuda --cuda-graphs",
        "needs one size of each",
    ),
    "CUDA graphs on the CPU": ("build-engine {onnx} --out {out} --backend ort --batch 2 --cuda-graphs", "needs a GPU"),
    "out that is the source": ("build-engine {onnx} --out {onnx} --backend ort --overwrite", "is not an engine"),
    "out of another kind": ("export {artifact} --out {engine} --overwrite", "is not an ONNX directory"),
    "images over an engine": ("sample {engine} --out {engine} --overwrite", "holds other files"),
    "a report over an artifact": ("evaluate {artifact} --out {artifact} --overwrite", "holds other files"),
    "out that is a file": ("calibrate {model} --out {file}", "is a file"),
    "out that is the working directory, with files": ("calibrate {model} --out . --overwrite", "holds other files"),
    "out above the working directory": ("export {artifact} --out ..", "contains the working directory"),
    "out in a directory that cannot be written": ("export {artifact} --out /proc/self/out", "Cannot write"),
    "seed of 20 digits": ("calibrate {model} --out {out} --seed 12345678901234567890", "--seed"),
    "seed of 20 digits to sample": ("sample {engine} --out {out} --seed 12345678901234567890", "--seed"),
    "negative seed": ("evaluate {artifact} --out {out} --seed -1", "--seed"),
    "kernels of an engine": ("bench {engine} --kernels torch", "--kernels is for --finetune-step"),
    "kernels that are no choice": ("finetune {model} --out {out} --kernels fast", "--kernels"),
    "resume of nothing": ("finetune {model} --out {out} --resume", "no checkpoint to resume"),
    "export of nothing": ("export {out}-missing --out {out}", "does not exist"),
    "plugin nodes for Polygraphy": ("export {artifact} --format polygraphy --out {out} --int4 plugin", "is not for --format polygraphy"),
    "a graph for Polygraphy": ("export {onnx} --format polygraphy --out {out}", "artifact"),
    "export to an unknown type": ("export {artifact} --out {out} --dtype fp8", "fp8"),
    "plugin nodes for no backend": ("export {artifact} --out {out} --dtype fp16 --int4 plugin", "Add --for trt"),
    "plugin nodes for another backend": (
        "export {artifact} --out {out} --dtype fp16 --int4 plugin --for ort",
        "does not run INT4 plugin nodes",
    ),
    "plugin nodes in float32": ("export {artifact} --out {out} --for trt --int4 plugin", "Add --dtype fp16"),
    "storage that the target does not read": ("export {artifact} --out {out} --weight-storage int4 --for trt", "--weight-storage int8"),
    "build of an artifact": ("build-engine {artifact} --out {out} --backend ort", "builds from an ONNX directory"),
    "build of an engine": ("build-engine {engine} --out {out} --backend ort", "expected an onnx directory"),
    "unknown backend": ("build-engine {onnx} --out {out} --backend openvin", "Did you mean 'openvino'"),
    "unknown gpu": ("build-engine {onnx} --out {out} --backend trt-rtx --gpu rtx3091", "rtx3091"),
    "option of another backend": ("build-engine {onnx} --out {out} --backend ort --gpu rtx3090", "--gpu"),
    "attention that is no choice": ("build-engine {artifact} --out {out} --backend cuda --attention int4", "--attention"),
    "attention of another backend": ("build-engine {onnx} --out {out} --backend ort --attention int8", "--attention"),
    "profile that is none": ("build-engine {onnx} --out {out} --backend ort --batch 1-8", "expected MIN:OPT:MAX"),
    "profile upside down": ("build-engine {onnx} --out {out} --backend ort --batch 8:4:1", "MIN <= OPT <= MAX"),
    "dimension that the model has not": ("build-engine {onnx} --out {out} --backend ort --tokens 77", "--tokens"),
    "height between the levels": ("build-engine {onnx} --out {out} --backend ort --height 7", "multiples of 2"),
    "no threads": ("build-engine {onnx} --out {out} --backend ort --threads 0", "expected 1 or more"),
    "builder's effort out of range": (
        "build-engine {onnx} --out {out} --backend trt-rtx --gpu rtx3090 --optimization-level 9",
        "expected 0 to 5",
    ),
    "sampling from a graph": ("sample {onnx} --out {out}", "build-engine"),
    "unknown scheduler": ("sample {engine} --out {out} --scheduler eulr", "Did you mean 'euler'"),
    "no images": ("sample {engine} --out {out} --num-images 0", "at least 1"),
    "no steps": ("sample {engine} --out {out} --steps 0", "at least 1"),
    "evaluation of a model": ("evaluate {model} --out {out}", "takes artifacts and engines"),
    "evaluation of a graph": ("evaluate {onnx} --out {out}", "build-engine"),
    "evaluation of nothing": ("evaluate {empty} --out {out}", "is no model, artifact"),
    "engine without a reference": ("evaluate {engine} --out {out}", "--reference MODEL"),
    "no samples": ("evaluate {artifact} --out {out} --samples 0", "expected 1 or more"),
    "benchmark of nothing": ("bench", "No engine was given"),
    "unknown baseline": ("bench {engine} --against torhc", "Did you mean 'torch'"),
    "batch over the profile": ("bench {engine} --batch 99", "outside the profile 1:4:8"),
    "no rounds": ("bench {engine} --rounds 0", "expected 1 or more"),
    "inspection of a file": ("inspect {file}", "is a file"),
    "inspection of nothing": ("inspect {empty}", "is no model, artifact"),
    "demo without a scheme": ("demo --out {out} --bits four", "W4A4"),
    "demo of too many bits": ("demo --out {out} --bits W9A9", "expected 2 to 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(run, chain, tmp_path, case):
    arguments, message = REFUSED[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no = toml =")
    paths = {**vars(chain), "empty": tmp_path / "empty", "file": tmp_path / "file", "out": tmp_path / "out"}
    ran = run(*(part.format(**paths) for part in arguments.split()))
    assert message in ran.complaint
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"empty", "file"}, "something was half-written"


def test_a_suggestion_ends_in_one_punctuation_mark(run):
    assert "Did you mean 'calibrate'? `edm-deploy --help` shows how." in run("calibrte").complaint


def test_a_flipped_byte_in_an_artifact_is_found(run, chain, copy_of, tmp_path):
    artifact = copy_of(chain.artifact)
    path = artifact / "artifact.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "is damaged" in run("export", artifact, "--out", tmp_path / "out").complaint
    assert not (tmp_path / "out").exists()


def test_a_changed_file_of_a_graph_is_found(run, chain, copy_of, tmp_path):
    onnx = copy_of(chain.onnx)
    with (onnx / "model.onnx").open("ab") as stream:
        stream.write(b"0")
    assert "does not match" in run("build-engine", onnx, "--out", tmp_path / "out", "--backend", "ort").complaint


def test_a_missing_file_of_an_engine_is_found(run, chain, copy_of, tmp_path):
    engine = copy_of(chain.engine)
    (engine / "model.onnx").unlink()
    assert "is missing" in run("sample", engine, "--out", tmp_path / "out").complaint


def test_a_pickle_checkpoint_is_refused(run, chain, copy_of, tmp_path):
    model = copy_of(chain.model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")
    assert "pickle" in run("calibrate", model, "--out", tmp_path / "out").complaint


def test_another_reference_is_refused(run, chain, copy_of, tmp_path):
    from edm_deploy_tools.common.assets import REFERENCE_MODEL

    assert "Name" in run("evaluate", chain.artifact, "--out", tmp_path / "out", "--reference", REFERENCE_MODEL).complaint


def test_a_full_disk_leaves_no_files(run, chain, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edm_deploy_tools.evaluation.evaluate.write_json", full)
    ran = run("evaluate", chain.artifact, "--out", tmp_path / "out", "--samples", 1, "--steps", 1)
    assert "No space left on device" in ran.complaint
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_in_one_line(run, chain, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edm_deploy_tools.inspection.describe.describe", interrupt)
    assert "Interrupted" in run("inspect", chain.artifact).error(130)


def test_an_internal_error_is_one_line_too(run, chain, monkeypatch):
    def fault(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("edm_deploy_tools.inspection.describe.describe", fault)
    assert "a fault of edm-deploy" in run("inspect", chain.artifact).complaint


def edit(path, change) -> None:
    """Change a json file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def weights(model):
    return model / "unet" / "diffusion_pytorch_model.safetensors"


def with_lora_beside(model):
    (model / "pytorch_lora_weights.safetensors").write_bytes(b"")


def with_lora_inside(model):
    tensors = safetensors.torch.load_file(weights(model))
    safetensors.torch.save_file(tensors | {"mid_block.attentions.0.to_q.lora_A.default.weight": torch.zeros(2, 2)}, weights(model))


def with_flipped_header(model):
    content = weights(model).read_bytes()
    weights(model).write_bytes(b"\xff" * 16 + content[16:])


def cut_short(model):
    weights(model).write_bytes(weights(model).read_bytes()[:-100])


def without_a_tensor(model):
    tensors = safetensors.torch.load_file(weights(model))
    tensors.pop("conv_in.weight")
    safetensors.torch.save_file(tensors, weights(model))


# What is done to a model's directory, and a part of the message.
MODELS = {
    "LoRA beside the weights": (with_lora_beside, "is a LoRA that is not fused into the model. Fuse it first"),
    "LoRA in the weights": (with_lora_inside, "carries a LoRA that is not fused: it has a tensor 'mid_block"),
    "SDXL refiner": (lambda m: edit(m / "model_index.json", lambda c: c.update(requires_aesthetics_score=True)), "is an SDXL refiner"),
    "quantized checkpoint": (
        lambda m: edit(m / "unet" / "config.json", lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"})),
        "is quantized already (bitsandbytes); expected float weights",
    ),
    "unknown class": (
        lambda m: edit(m / "model_index.json", lambda c: c.update(unet=["diffusers", "UNet2DConditonModel"])),
        "Did you mean 'UNet2DConditionModel'? Known:",
    ),
    "class without a family": (
        lambda m: edit(m / "model_index.json", lambda c: c.update(unet=["diffusers", "Kandinsky3UNet"])),
        "To add one, write edm_deploy/models/<name>.py (CONTRIBUTING.md)",
    ),
    "no scheduler": (
        lambda m: edit(m / "model_index.json", lambda c: c.pop("scheduler")),
        "is a pipeline without a scheduler; a trajectory needs one. Add scheduler/scheduler_config.json",
    ),
    "no denoiser": (lambda m: edit(m / "model_index.json", lambda c: c.pop("unet")), "without a unet or transformer"),
    "weights with a broken header": (with_flipped_header, "Download or save the model again"),
    "weights cut short": (cut_short, "Download or save the model again"),
    "a tensor missing": (without_a_tensor, "'conv_in.weight'"),
    "another shape than the config says": (
        lambda m: edit(m / "unet" / "config.json", lambda c: c.update(layers_per_block=2)),
        "Download or save the model again",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_quantized_is_refused_in_one_line(run, chain, copy_of, tmp_path, case):
    damage, message = MODELS[case]
    model = copy_of(chain.model)
    damage(model)
    ran = run("calibrate", model, "--out", tmp_path / "out", "--rows", 2)
    assert message in ran.complaint
    assert not (tmp_path / "out").exists()
    # The same message as a reference of evaluate.
    assert message in run("evaluate", chain.artifact, "--reference", model, "--out", tmp_path / "out").complaint
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_refused_in_one_line(run, chain, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**8))
    ran = run("calibrate", chain.model, "--out", tmp_path / "out", "--rows", 2)
    assert re.search(r"needs about 1\.\d GB of memory; 0\.1 GB are available\. Use --low-memory", ran.complaint)
    assert not (tmp_path / "out").exists()


def test_a_pixel_space_model_takes_no_conditioning(run, chain, tmp_path):
    (tmp_path / "p").write_text("a cat\n")
    out = ("--out", tmp_path / "out")
    assert "takes no text" in run("sample", chain.engine, *out, "--prompt", "a cat").complaint
    assert "takes no class" in run("sample", chain.engine, *out, "--class-label", 3).complaint
    assert "is not guided" in run("sample", chain.engine, *out, "--guidance", 3).complaint
    assert "without text encoders" in run("evaluate", chain.artifact, *out, "--prompts", tmp_path / "p").complaint
    assert "without text encoders" in run("calibrate", chain.model, *out, "--prompts", tmp_path / "p").complaint
    assert "is not guided" in run("evaluate", chain.artifact, *out, "--guidance", 3).complaint
    assert not (tmp_path / "out").exists()


def test_a_text_conditional_model_needs_a_prompt(run, prompted, tmp_path):
    assert "Add --prompt TEXT" in run("sample", prompted.engine, "--out", tmp_path / "out").complaint
    missing = ("--prompts", tmp_path / "none")
    assert "cannot be read" in run("sample", prompted.engine, "--out", tmp_path / "out", *missing).complaint


@pytest.fixture
def alone(run, prompted, tmp_path):
    """An engine of a text-conditional UNet whose pipeline was saved without text encoder and VAE."""
    engine = tmp_path / "alone"
    shutil.copytree(prompted.engine, engine, ignore=shutil.ignore_patterns("text_encoder", "tokenizer", "vae"))
    index = json.loads((engine / "model_index.json").read_text())
    kept = {name: value for name, value in index.items() if not isinstance(value, list) or name in ("unet", "scheduler")}
    (engine / "model_index.json").write_text(json.dumps(kept))
    edit(
        engine / "manifest.json",
        lambda c: c.update(files={name: sha256_of(engine / name) for name in c["files"] if (engine / name).exists()}),
    )
    return engine


def test_an_engine_without_the_rest_of_its_pipeline_is_refused_before_it_is_loaded(run, alone, monkeypatch, tmp_path):
    monkeypatch.setattr("edm_deploy_tools.images.sample.load_pipeline", lambda *_, **__: pytest.fail("was loaded"))
    ran = run("sample", alone, "--out", tmp_path / "out", "--prompt", "a cat")
    assert "is an engine of a UNet2DConditionModel, which needs encoder_hidden_states, and its pipeline was saved without" in ran.complaint
    assert "--source" in ran.err
    assert not (tmp_path / "out").exists()


def test_the_rest_of_a_pipeline_is_taken_from_the_named_source(run, alone, prompted, tmp_path):
    ran = run("sample", alone, "--out", tmp_path / "out", "--prompt", "a cat", "--steps", 1, "--source", prompted.model)
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "000.png").is_file()


def test_a_missing_text_encoder_is_named_with_the_remedy(run, prompted, copy_of, tmp_path):
    source = copy_of(prompted.model)
    shutil.rmtree(source / "text_encoder")
    ran = run("sample", prompted.engine, "--out", tmp_path / "out", "--prompt", "a", "--source", source)
    assert "has no 'text_encoder', which a StableDiffusionPipeline needs. Name the pipeline with --source" in ran.complaint

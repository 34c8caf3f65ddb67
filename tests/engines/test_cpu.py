"""The backend `cpu`. Its kernels are compared with the reference site by site in tests/contracts/, for every family."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import engines.cpu
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.native.cpp import COMPILERS
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import code_format
from edm_deploy.runtime.load import load_denoiser, load_pipeline, open_session
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs
from engines import build_engine
from engines.cpu import BACKEND
from engines.from_artifact.packed_engine import ENGINE_NAME
from engines.kernels.cpu import build as kernels
from tests.conftest import artifact_by_hand, tiny_inputs
from tests.engines.reference_check import check_against_reference, check_own_rows
from tests.tiny_loras import peft_tensors

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(artifact_w4a4, tmp_path_factory):
    return artifact_w4a4.save(tmp_path_factory.mktemp("cpu") / "artifact")


@pytest.fixture(scope="module")
def engine(saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("cpu") / "engine"
    build_engine(saved, path, backend="cpu", options=BuildOptions(threads=1, profile={"batch": ShapeRange(1, 2, 8)}))
    return path


@pytest.fixture(scope="module")
def denoiser(engine):
    with load_denoiser(engine) as opened:
        yield opened


def test_every_site_runs_as_int8_and_the_plan_states_how_its_codes_are_packed(engine, artifact_w4a4):
    manifest = Manifest.read(engine, kind="engine")
    assert {site.executed for site in manifest.plan.values()} == {"int8"}
    assert {name: site.codes for name, site in manifest.plan.items()} == {
        name: code_format(site) for name, site in artifact_w4a4.sites.items()
    }
    assert manifest.build["options"] == {"precision": "bf16", "threads": 1}
    assert manifest.build["warnings"] == []


def test_weights_that_fit_are_stored_in_four_bits(engine, artifact_w4a4):
    codes = artifact_w4a4.sites["up_blocks.0.resnets.0.conv1"].codes  # 32 input channels: whole chunks of 16 bytes
    assert load_file(engine / ENGINE_NAME)["sites.up_blocks.0.resnets.0.conv1.weight"].numel() == codes.numel() // 2


def test_it_agrees_with_the_reference_at_mixed_timesteps(engine, artifact_w4a4):
    # bfloat16 between the sites: every flip of a code draws the rounding noise anew.
    check_against_reference(engine, artifact_w4a4, slack=1.5)


def test_float16_between_the_sites(saved, artifact_w4a4, tmp_path):
    manifest = build_engine(saved, tmp_path / "engine", backend="cpu", options=BuildOptions(precision="fp16", threads=1))
    assert BACKEND.site_dtype(manifest) == torch.float16
    check_against_reference(tmp_path / "engine", artifact_w4a4, slack=1.25)


def test_every_site_is_the_references_at_mixed_timesteps(engine, artifact_w4a4, tmp_path):
    cut = cut_from_inputs(artifact_w4a4, tiny_inputs("unet2d", 4), tmp_path / "cut", dtype=torch.bfloat16)
    sites = agreement(cut, Manifest.read(engine, kind="engine"), device="cpu")
    assert {site.site for site in sites} == set(artifact_w4a4.sites)
    assert sum(site.ties + site.differ for site in sites) == 0
    assert max(site.output_error for site in sites) <= torch.finfo(torch.bfloat16).eps / 2


def test_each_sample_of_a_batch_uses_its_own_row(denoiser, artifact_w4a4):
    check_own_rows(denoiser, artifact_w4a4)


def test_a_batch_size_gives_the_same_bits_whatever_ran_between(denoiser):
    inputs = {batch: tiny_inputs("unet2d", batch) for batch in (1, 2, 3, 4)}
    first = {batch: denoiser(**values).sample for batch, values in inputs.items()}
    for batch in (4, 1, 3, 2, 1):
        assert torch.equal(denoiser(**inputs[batch]).sample, first[batch])


def test_two_threads_of_the_kernels_give_the_bits_of_one(denoiser, saved, tmp_path):
    build_engine(saved, tmp_path / "engine", backend="cpu", options=BuildOptions(threads=2))
    with load_denoiser(tmp_path / "engine") as two:
        for batch in (3, 1):
            inputs = tiny_inputs("unet2d", batch)
            assert torch.equal(two(**inputs).sample, denoiser(**inputs).sample)


def test_without_a_number_the_kernels_use_torchs_threads(saved, tmp_path):
    manifest = build_engine(saved, tmp_path / "engine", backend="cpu")
    assert manifest.build["options"]["threads"] is None
    assert engines.cpu._threads(manifest) == torch.get_num_threads()


def test_two_calls_at_once_each_get_their_own_result(denoiser):
    calls = [tiny_inputs("unet2d", 2, seed=seed) for seed in range(6)]
    alone = [denoiser(**inputs).sample for inputs in calls]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda inputs: denoiser(**inputs).sample, calls * 2))
    assert all(torch.equal(found, expected) for found, expected in zip(together, alone * 2, strict=True))


def test_it_drops_into_a_pipeline_at_any_number_of_steps(engine):
    pipe = load_pipeline(engine, scheduler="dpm-solver++")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert torch.from_numpy(images).isfinite().all()


def test_a_lora_is_applied_at_every_batch_size_and_removed_without_a_trace(saved, tmp_path):
    manifest = build_engine(saved, tmp_path / "engine", backend="cpu", options=BuildOptions(threads=1, lora_rank=2, lora_layers="."))
    inputs = {batch: tiny_inputs("unet2d", batch) for batch in (1, 2)}
    with load_denoiser(tmp_path / "engine") as opened:
        before = {batch: opened.run(values) for batch, values in inputs.items()}
        name = opened.load_lora(peft_tensors(manifest.adapters.layers, rank=2))
        loaded = {batch: opened.run(values) for batch, values in inputs.items()}
        assert not any(torch.equal(loaded[batch], before[batch]) for batch in inputs)
        opened.unload_lora(name)
        assert all(torch.equal(opened.run(values), before[batch]) for batch, values in inputs.items())


def test_an_engine_without_slots_names_the_build_that_makes_them(denoiser):
    with pytest.raises(InputError, match="build it again with build-engine --lora-rank 64"):
        denoiser.load_lora({})


def test_weight_only_sites_are_float_with_a_warning(tmp_path):
    artifact = artifact_by_hand(act_bits=16)
    manifest = build_engine(artifact.save(tmp_path / "artifact"), tmp_path / "engine", backend="cpu", options=BuildOptions(threads=1))
    assert {site.executed for site in manifest.plan.values()} == {"float", "int8"}
    assert "41 sites quantize their weights only" in manifest.build["warnings"][0]
    check_against_reference(tmp_path / "engine", artifact, slack=1.5)


def test_sites_that_no_kernel_computes_fail_the_build_or_run_in_floating_point(saved, artifact_w4a4, tmp_path, monkeypatch):
    monkeypatch.setattr("engines.from_artifact.packed_engine.unsupported_reason", lambda layer, filters: "a 3x3 filter")
    monkeypatch.setattr(
        "edm_deploy.runtime.capabilities.unsupported_reason",
        lambda layer, filters: "a 3x3 filter" if getattr(layer, "kernel_size", None) == (3, 3) else None,
    )
    with pytest.raises(UnsupportedError, match="no integer kernel in cpu; first 'conv_in': a 3x3 filter"):
        build_engine(saved, tmp_path / "engine", backend="cpu")
    assert not (tmp_path / "engine").exists()
    accepted = BuildOptions(threads=1, allow_float_sites=True)
    manifest = build_engine(saved, tmp_path / "engine", backend="cpu", options=accepted)
    assert (manifest.plan["conv_in"].executed, manifest.plan["conv_in"].codes) == ("float", None)
    check_against_reference(tmp_path / "engine", artifact_w4a4, slack=1.5)


def test_an_engine_of_another_layout_or_backend_is_refused(engine):
    manifest = Manifest.read(engine, kind="engine")
    with pytest.raises(UnsupportedError, match=r"packed in layout 0; this edm-deploy reads 1\. Build it again with .* --backend cpu"):
        BACKEND.open(engine, replace(manifest, build={**manifest.build, "layout": 0}), CPU)
    with pytest.raises(UnsupportedError, match="Open it with cuda"):
        BACKEND.open(engine, replace(manifest, backend="cuda"), CPU)


def test_another_device_is_refused(engine):
    with pytest.raises(
        UnsupportedError, match=r"cpu runs on the cpu, not on cuda\. Open the engine with device='cpu', or build for cuda\."
    ):
        open_session(engine, device="cuda")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (BuildOptions(precision="fp32"), InputError, "--precision 'fp32': cpu has bf16 and fp16"),
        (BuildOptions(gpu="rtx3090"), UnsupportedError, "cpu has no option --gpu"),
        (BuildOptions(attention="int8"), UnsupportedError, "cpu has no option --attention"),
    ],
)
def test_options_of_other_backends_are_refused(saved, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        build_engine(saved, tmp_path / "engine", backend="cpu", options=options)


def test_a_missing_compiler_is_reported_before_any_weight_is_read(engine, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)  # not the library that is loaded already
    monkeypatch.setattr(engines.cpu, "load_tensors", lambda path: pytest.fail("a weight was read"))
    with pytest.raises(UnsupportedError, match="CXX is 'no-such-compiler', which is not there"):
        open_session(engine)


@pytest.mark.parametrize(("instructions", "warned"), [("AVX512-VNNI", False), ("AVX-VNNI", False), ("AVX2", True), ("portable", True)])
def test_a_cpu_without_vnni_is_told_that_openvino_is_likely_to_be_faster(monkeypatch, instructions, warned):
    said = []
    monkeypatch.setattr(kernels, "instructions", lambda: instructions)
    monkeypatch.setattr(engines.cpu.log, "warning", lambda text, *values: said.append(text % values))
    engines.cpu._check_kernels(CPU)
    assert [f"by {instructions} code, and openvino" in line for line in said] == [True] * warned

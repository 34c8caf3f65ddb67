from collections import Counter
from dataclasses import replace

import pytest
import torch

import engines
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.schedulers import schedulers_for
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import code_format
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser, load_pipeline, open_session
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs
from engines import build_engine
from engines.cuda import BACKEND, ENGINE_NAME, code_formats_on
from tests.conftest import SCHEDULER, artifact_by_hand, tiny_inputs, tiny_model
from tests.engines.reference_check import check_against_reference, check_own_rows

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def saved(artifact_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "artifact"
    artifact_w4a4.save(path)
    return path


@pytest.fixture(scope="module")
def engine(saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "engine"
    build_engine(saved, path, backend="cuda", options=BuildOptions(gpu="rtx3090", profile={"batch": ShapeRange(1, 2, 8)}))
    return path


@pytest.fixture(scope="module")
def denoiser(engine):
    return load_denoiser(engine, device="cpu")


def test_the_plan_is_int4_with_the_code_format_where_codes_fit(engine, artifact_w4a4):
    plan = Manifest.read(engine, kind="engine").plan
    assert Counter((site.stored, site.executed) for site in plan.values()) == {("W4A4", "int4"): 41, ("W8A8", "int8"): 10}
    assert {name: site.codes for name, site in plan.items()} == {name: code_format(site) for name, site in artifact_w4a4.sites.items()}


def test_a_gpu_without_int4_is_planned_as_int8_with_a_warning(saved, tmp_path):
    manifest = build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="h200"))
    assert {site.executed for site in manifest.plan.values()} == {"int8"}
    assert manifest.build["warnings"] == ["sm_90 has no INT4 tensor cores: 41 sites whose codes fit 4 bits run as INT8."]
    assert manifest.plan["conv_out"].codes == "s8"
    assert manifest.plan["mid_block.resnets.0.conv1"].codes == "u4"  # packed narrow all the same: it is widened when it is opened


def test_an_engine_for_int4_gives_the_same_bits_widened_to_int8(engine, denoiser, saved, tmp_path):
    build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="h200"))
    inputs = tiny_inputs("unet2d", 3)
    assert torch.equal(load_denoiser(tmp_path / "engine", device="cpu")(**inputs).sample, denoiser(**inputs).sample)


@pytest.mark.extended  # a whole model, traced twice
def test_an_engine_with_a_compiled_rest_computes_the_same_model(engine, denoiser, saved, artifact_w4a4, tmp_path):
    manifest = build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="rtx3090", rest="inductor"))
    assert manifest.build["options"]["rest"] == "inductor"
    assert Manifest.read(engine, kind="engine").build["options"]["rest"] == "eager"
    check_against_reference_on_cpu(tmp_path / "engine", artifact_w4a4)


def test_an_engine_opens_with_the_rest_that_it_was_built_for(engine, monkeypatch):
    from engines.torch_graph import compiled_rest

    seen = []
    monkeypatch.setattr(compiled_rest, "compiled_rest", lambda module, device: seen.append(device) or module)
    manifest = Manifest.read(engine, kind="engine")
    BACKEND.open(engine, manifest, torch.device("cpu"))
    manifest.build["options"].pop("rest")  # an engine of an earlier version
    BACKEND.open(engine, manifest, torch.device("cpu"))
    assert seen == []
    manifest.build["options"]["rest"] = "inductor"
    BACKEND.open(engine, manifest, torch.device("cpu"))
    assert seen == [torch.device("cpu")]


def test_an_engine_with_attention_in_int8_computes_the_same_model(engine, denoiser, saved, tmp_path, monkeypatch):
    from engines.torch_graph import attention

    replaced, real = [], attention.attention_in_int8
    monkeypatch.setattr(attention, "attention_in_int8", lambda graph: replaced.extend(real(graph)) or replaced)
    manifest = build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="rtx3090", attention="int8"))
    assert manifest.build["options"]["attention"] == "int8"
    assert Manifest.read(engine, kind="engine").build["options"]["attention"] == "float"
    inputs = tiny_inputs("unet2d", 3)
    found, expected = load_denoiser(tmp_path / "engine", device="cpu")(**inputs).sample, denoiser(**inputs).sample
    assert len(replaced) == 4
    family, _, model = tiny_model("unet2d")
    # One code that falls the other way draws the rounding noise of a 4-bit network anew: two independent draws are sqrt(2) of one apart.
    assert 0 < (found - expected).norm() < 1.6 * (expected - family.forward(model, inputs)).norm()


def test_a_model_without_attention_that_the_kernels_have_is_named(engine, monkeypatch):
    import engines.cuda
    from engines.torch_graph import attention

    said = []
    monkeypatch.setattr(engines.cuda.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(attention, "attention_in_int8", lambda graph: [])
    manifest = Manifest.read(engine, kind="engine")
    manifest.build["options"]["attention"] = "int8"
    BACKEND.open(engine, manifest, torch.device("cpu"))
    assert said[1:] == ["--attention int8: this model has no attention that the kernels compute; all of it runs in floating point."]


def test_it_agrees_with_the_reference_at_mixed_timesteps(engine, artifact_w4a4):
    check_against_reference_on_cpu(engine, artifact_w4a4)


def check_against_reference_on_cpu(engine, artifact):
    # float16 between the sites: every flip of a code draws the rounding noise anew.
    check_against_reference(engine, artifact, slack=1.25, device="cpu")


def test_bfloat16_between_the_sites(saved, artifact_w4a4, tmp_path):
    manifest = build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(precision="bf16"))
    assert BACKEND.site_dtype(manifest) == torch.bfloat16
    inputs = tiny_inputs("unet2d", 2)
    cut = cut_from_inputs(artifact_w4a4, inputs, tmp_path / "cut", dtype=torch.bfloat16)
    sites = agreement(cut, manifest, device="cpu")
    assert sum(site.ties + site.differ for site in sites) == 0
    assert max(site.output_error for site in sites) <= torch.finfo(torch.bfloat16).eps / 2


def test_each_sample_of_a_batch_uses_its_own_row(denoiser, artifact_w4a4):
    check_own_rows(denoiser, artifact_w4a4)


def test_the_models_embedding_depends_on_the_fraction_of_a_timestep(denoiser):
    inputs = tiny_inputs("unet2d", 1)
    first, second = (denoiser(inputs["sample"], torch.tensor([timestep])).sample for timestep in (399.6, 400.4))  # one row
    assert not torch.equal(first, second)


@pytest.mark.parametrize("scheduler", schedulers_for(SCHEDULER))
def test_it_drops_into_a_pipeline_with_every_scheduler(engine, denoiser, scheduler, monkeypatch):
    monkeypatch.setattr("edm_deploy.runtime.load.load_denoiser", lambda path, device, **_: denoiser)  # opened once for all of them
    pipe = load_pipeline(engine, device="cpu", scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert torch.from_numpy(images).isfinite().all()


def test_weight_only_sites_are_float_with_a_warning(tmp_path):
    artifact = artifact_by_hand(act_bits=16)
    artifact.save(tmp_path / "artifact")
    manifest = build_engine(tmp_path / "artifact", tmp_path / "engine", backend="cuda")
    assert Counter(site.executed for site in manifest.plan.values()) == {"float": 41, "int8": 10}
    assert "41 sites quantize their weights only" in manifest.build["warnings"][0]
    check_against_reference_on_cpu(tmp_path / "engine", artifact)


@pytest.fixture
def logged(monkeypatch):
    """Warnings that the backend logged."""
    lines: list[str] = []
    monkeypatch.setattr(engines.cuda.log, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_opening_on_the_cpu_warns_that_it_checks_arithmetic(engine, logged):
    code_formats_on(Manifest.read(engine, kind="engine"), torch.device("cpu"))
    assert len(logged) == 1
    assert "checks arithmetic, not speed" in logged[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_is_refused_with_what_is_missing_and_how_to_check(engine):
    with pytest.raises(UnsupportedError, match=r"needs an NVIDIA GPU, and torch .* here\. .* build for ort or openvino; .*--device cpu"):
        open_session(engine)


def fake_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")


def test_a_gpu_that_is_too_old_is_refused(engine, saved, tmp_path, monkeypatch):
    with pytest.raises(UnsupportedError, match=r"t4 is sm_75; the kernels need sm_80 or later\. Build with --backend ort, openvino or trt"):
        build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="t4"))
    fake_gpu(monkeypatch, (7, 5))
    with pytest.raises(UnsupportedError, match="Some GPU is sm_75"):
        open_session(engine, device="cuda")


def test_without_a_name_it_is_planned_for_the_present_gpu(saved, tmp_path, monkeypatch):
    fake_gpu(monkeypatch, (8, 9))
    assert build_engine(saved, tmp_path / "engine", backend="cuda").build["options"]["gpu"] == "sm_89"


def test_another_gpu_runs_it_with_the_kernels_that_it_has(engine, monkeypatch, logged):
    fake_gpu(monkeypatch, (9, 0))
    kinds = code_formats_on(Manifest.read(engine, kind="engine"), torch.device("cuda"))
    assert set(kinds.values()) == {"s8"}
    assert "planned for sm_86 and runs on sm_90, which has no INT4 tensor cores: sites of 4 bits run as INT8" in logged[0]


def test_one_gpu_is_named(saved, tmp_path):
    with pytest.raises(InputError, match="--gpu rtx3090,rtx4090: name one GPU"):
        build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="rtx3090,rtx4090"))


def test_an_unsupported_precision_is_refused(saved, tmp_path):
    with pytest.raises(InputError, match="--precision 'fp32': cuda has fp16 and bf16"):
        build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(precision="fp32"))


def test_an_engine_of_another_layout_or_backend_is_refused(engine):
    manifest = Manifest.read(engine, kind="engine")
    with pytest.raises(UnsupportedError, match=r"packed in layout 0; this edm-deploy reads 1\. Build it again"):
        BACKEND.open(engine, replace(manifest, build={**manifest.build, "layout": 0}), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="Open it with ort"):
        BACKEND.open(engine, replace(manifest, backend="ort"), torch.device("cpu"))


def test_weights_are_stored_in_four_bits(engine, artifact_w4a4):
    from safetensors.torch import load_file

    tensors = load_file(engine / ENGINE_NAME)
    codes = artifact_w4a4.sites["up_blocks.0.resnets.0.conv1"].codes  # 32 input channels: whole chunks of 16 bytes
    assert tensors["sites.up_blocks.0.resnets.0.conv1.weight"].numel() == codes.numel() // 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8)], ids=str)
def test_on_a_gpu_every_site_is_the_references(bits, tmp_path):
    artifact = artifact_by_hand(weight_bits=bits[0], act_bits=bits[1])
    artifact.save(tmp_path / "artifact")
    manifest = build_engine(tmp_path / "artifact", tmp_path / "engine", backend="cuda")
    cut = cut_from_inputs(artifact, tiny_inputs("unet2d", 4), tmp_path / "cut", dtype=torch.float16)
    sites = agreement(cut, manifest, device="cuda")
    assert sum(site.differ for site in sites) == 0
    assert max(site.output_error for site in sites) <= torch.finfo(torch.float16).eps / 2


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_replay_gives_what_eager_gives_at_every_timestep_and_shape(engine):
    manifest, session = open_session(engine, device="cuda")
    denoiser = EngineDenoiser(manifest, session)
    for batch in (1, 4, 2, 3, 5, 1):  # more shapes than graphs are kept
        for seed in (0, 1):
            inputs = {name: value.cuda() for name, value in tiny_inputs("unet2d", batch, seed=seed).items()}
            inputs["timestep"] = inputs["timestep"].roll(seed)
            replayed = denoiser(**inputs).sample
            eager = session._eager({name: inputs[name] for name in ("sample", "timestep")})["prediction"]
            assert torch.equal(replayed, eager)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_outputs_outlive_the_next_run(engine):
    denoiser = load_denoiser(engine, device="cuda")
    inputs = {name: value.cuda() for name, value in tiny_inputs("unet2d", 2).items()}
    first = denoiser(**inputs).sample
    kept = first.clone()
    denoiser(inputs["sample"] + 1, inputs["timestep"])
    assert torch.equal(first, kept)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [(4, 4), (8, 8)], ids=str)
def test_on_a_gpu_the_whole_shipped_model_is_near_its_reference(bits, tmp_path):
    from calibration import fit
    from calibration.run.options import RunOptions
    from edm_deploy.pipelines.source import load_source
    from edm_deploy_tools.common.assets import REFERENCE_MODEL
    from edm_deploy_tools.common.recipe_settings import recipe_with

    source = load_source(str(REFERENCE_MODEL))
    artifact = fit(source, recipe_with("minmax", flags={"weight_bits": bits[0], "act_bits": bits[1], "rows": 5}), RunOptions())
    artifact.save(tmp_path / "artifact")
    build_engine(tmp_path / "artifact", tmp_path / "engine", backend="cuda")
    inputs = {
        "sample": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([10.0, 300.0, 600.0, 990.0]),
    }
    expected, floats = Reference(artifact)(inputs), source.family_object.forward(source.model, inputs)
    found = load_denoiser(tmp_path / "engine", device="cuda")(**{name: value.cuda() for name, value in inputs.items()}).sample.cpu()
    assert (found - expected).norm() <= 1.25 * (expected - floats).norm()

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from edm_deploy import load_denoiser
from edm_deploy.adapters.site_weights import adapters_of
from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.lora_methods import weight_tensor
from edm_deploy.runtime.manifest import ShapeRange
from engines import build_engine
from tests.conftest import artifact_by_hand, tiny_inputs
from tests.tiny_loras import peft_tensors

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    artifact = artifact_by_hand("unet2d-condition")
    onnx_from_artifact(artifact, folder / "onnx", adapters=adapters_of(artifact, rank=4))
    sizes = {"batch": ShapeRange(1, 2, 4), "height": ShapeRange(8, 8, 8), "width": ShapeRange(8, 8, 8), "tokens": ShapeRange(1, 77, 77)}
    build_engine(folder / "onnx", folder / "engine", backend="ort", options=BuildOptions(profile=sizes))
    return folder / "engine"


@pytest.fixture
def denoiser(engine):
    with load_denoiser(engine) as opened:
        yield opened


@pytest.fixture(scope="module")
def inputs():
    return tiny_inputs("unet2d-condition", batch=4)


def style(denoiser, *, rank=2, seed=0, prefix=""):
    return peft_tensors(denoiser.manifest.adapters.layers, rank=rank, seed=seed, prefix=prefix)


def test_a_file_is_loaded_weighed_named_and_unloaded(denoiser, inputs, tmp_path):
    save_file(style(denoiser), tmp_path / "style.safetensors")
    before = denoiser.run(inputs)
    assert denoiser.load_lora(tmp_path / "style.safetensors", weight=0.8) == "default_0"
    assert denoiser.load_lora(str(tmp_path), name="again") == "again"
    assert denoiser.active_adapters() == ["default_0", "again"]
    both = denoiser.run(inputs)
    denoiser.set_adapters("default_0", 1.8)  # one file twice: 0.8 + 1
    assert denoiser.active_adapters() == ["default_0"]
    torch.testing.assert_close(denoiser.run(inputs), both, atol=0.02 * float((both - before).abs().max()), rtol=0)
    denoiser.unload_lora("default_0")
    assert list(denoiser.peft_config) == ["again"]
    denoiser.unload_lora()
    assert torch.equal(denoiser.run(inputs), before)


def test_it_has_the_methods_that_pipelines_of_diffusers_call(denoiser, inputs):
    before = denoiser.run(inputs)
    denoiser.load_lora_adapter(
        style(denoiser, prefix="unet."), prefix="unet", adapter_name="a", network_alphas=None, metadata=None, _pipeline=None
    )
    loaded = denoiser.run(inputs)
    assert not torch.equal(loaded, before)
    denoiser.disable_lora()
    assert torch.equal(denoiser.run(inputs), before) and denoiser.active_adapters() == []
    denoiser.enable_lora()
    assert torch.equal(denoiser.run(inputs), loaded)
    alphas = {name.replace(".lora_A.weight", ".alpha"): 2.0 for name in style(denoiser, prefix="unet.") if "lora_A" in name}
    denoiser.delete_adapters("a")
    denoiser.load_lora_adapter(style(denoiser, prefix="unet."), prefix="unet", adapter_name="b", network_alphas=alphas)
    assert torch.equal(denoiser.run(inputs), loaded)  # alpha 2 of rank 2
    denoiser.delete_adapters(["b"])
    denoiser.load_lora_adapter({"text_encoder.x.lora_A.weight": torch.zeros(1)}, prefix="unet")  # of another component
    assert denoiser.peft_config == {}
    with pytest.raises(UnsupportedError, match="takes adapters without hotswap"):
        denoiser.load_lora_adapter({}, hotswap=True)
    with pytest.raises(UnsupportedError, match="cannot be fused into an engine, whose weights are rounded"):
        denoiser.fuse_lora(1.0, safe_fusing=False)


def test_a_pipeline_of_diffusers_loads_sets_and_unloads_it(denoiser, tmp_path):
    pytest.importorskip("peft", reason="diffusers' pipelines load LoRAs only where peft is installed")
    from tests.tiny_pipelines import stable_diffusion

    pipeline = stable_diffusion()
    pipeline.unet = denoiser
    pipeline.set_progress_bar_config(disable=True)

    def image():
        return pipeline(
            "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), height=16, width=16, output_type="latent"
        ).images

    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = pipeline.text_encoder.config.hidden_size
    before = image()
    text = {f"{layer}.lora_A.weight": torch.ones(1, width), f"{layer}.lora_B.weight": torch.ones(width, 1)}
    save_file(style(denoiser, prefix="unet.") | text, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline.load_lora_weights(tmp_path, adapter_name="a")
    pipeline.load_lora_weights(style(denoiser, seed=1, prefix="unet."), adapter_name="b")
    assert pipeline.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a"]}
    pipeline.set_adapters(["a", "b"], [0.5, 0.0])
    assert denoiser.active_adapters() == ["a"]
    assert float(denoiser._state().named("a").weight) == 0.5
    assert not torch.equal(image(), before)
    pipeline.unload_lora_weights()
    assert denoiser.peft_config == {}
    assert torch.equal(image(), before)


def test_calls_of_two_threads_keep_the_adapters_that_they_began_with(denoiser, inputs):
    """One thread predicts while another loads and unloads: every prediction is one of the two, never a mixture of weights and scales."""
    plain = denoiser.run(inputs)
    denoiser.load_lora(style(denoiser), name="a")
    adapted = denoiser.run(inputs)
    denoiser.unload_lora()
    stop = threading.Event()

    def change():
        while not stop.is_set():
            denoiser.load_lora(style(denoiser), name="a")
            denoiser.unload_lora("a")

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        found = [denoiser.run(inputs) for _ in range(20)]
        stop.set()
        changing.result()
    assert all(torch.equal(each, plain) or torch.equal(each, adapted) for each in found)


def test_misuse_is_one_clear_error(denoiser, inputs):
    denoiser.load_lora(style(denoiser, rank=3), name="a")
    with pytest.raises(InputError, match="An adapter 'a' is loaded already"):
        denoiser.load_lora(style(denoiser, rank=1), name="a")
    with pytest.raises(
        InputError, match=r"ranks 3 \+ 2 = 5 together; this engine has 4 rank slots\. Unload one, or export again with --lora-rank 5"
    ):
        denoiser.load_lora(style(denoiser, rank=2))
    with pytest.raises(InputError, match=r"has rank 5; this engine has 4 rank slots\. Export it again with --lora-rank 5"):
        denoiser.load_lora(style(denoiser, rank=5))
    with pytest.raises(InputError, match="No adapter 'z' is loaded; loaded are a"):
        denoiser.set_adapters("z")
    with pytest.raises(InputError, match="2 weights for 1 adapters"):
        denoiser.set_adapters(["a"], [1.0, 2.0])
    denoiser.set_adapters("a", [1.0, 0.5, 0.0])
    with pytest.raises(InputError, match="has weights for 3 samples, the batch has 4"):
        denoiser.run(inputs)
    assert list(denoiser.peft_config) == ["a"]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e9, "x", [[1.0]], [], {"mid": 1.0}], ids=str)
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(InputError, match="An adapter's weight "):
        weight_tensor(weight)


def test_an_engine_without_rank_slots_says_how_to_get_them(onnx_w4a4, tmp_path):
    build_engine(onnx_w4a4, tmp_path / "engine", backend="ort")
    with (
        load_denoiser(tmp_path / "engine") as denoiser,
        pytest.raises(InputError, match=r"built without rank slots .* export the graph again with export --lora-rank 64"),
    ):
        denoiser.load_lora({})


@pytest.mark.extended
def test_both_engines_of_relaxed_timesteps_take_the_adapters(tmp_path):
    artifact = replace(artifact_by_hand("unet2d", 8, 4), relaxed=mask_from_intervals([(0, 499)], 1000))
    adapters = adapters_of(artifact, rank=2)
    onnx_from_artifact(artifact, tmp_path / "onnx", adapters=adapters)
    build_engine(tmp_path / "onnx", tmp_path / "engine", backend="ort")
    inputs = tiny_inputs("unet2d", batch=4)  # timesteps 0, 333, 666, 999
    with load_denoiser(tmp_path / "engine") as denoiser:
        before = denoiser.run(inputs)
        denoiser.load_lora(peft_tensors(adapters.layers, rank=2), weight=[1.0, 0.0, 0.0, 1.0])
        found = denoiser.run(inputs)
        assert [torch.equal(one, other) for one, other in zip(found, before, strict=True)] == [False, True, True, False]

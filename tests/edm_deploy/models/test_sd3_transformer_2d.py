import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.prompt_encoding import conditioner_of
from edm_deploy.pipelines.schedulers import scheduler_named, schedulers_for
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import ShapeRange
from engines import build_engine
from tests.conftest import FLOW_SCHEDULER, tiny_model
from tests.edm_deploy.models.chain import (
    PROMPTS,
    chain,
    check_components,
    check_float_engine,
    check_pipeline,
    check_prompts,
    check_quantized_engine,
    home,
)

pytest.importorskip("onnxruntime")


def test_the_float_engine_is_the_model_at_two_resolutions_and_mixed_timesteps():
    check_float_engine("sd3")


def test_the_quantized_engine_is_the_reference():
    check_quantized_engine("sd3")


@pytest.mark.parametrize("size", [{}, {"height": 64, "width": 128}], ids=["own-size", "wider"])
@pytest.mark.parametrize("scheduler", [None, *schedulers_for(FLOW_SCHEDULER)])
def test_its_pipeline_comes_back_with_every_scheduler(scheduler, size):
    check_pipeline("sd3", scheduler, prompt=PROMPTS[0], **size, output_type="latent")


def test_its_pipeline_comes_back_with_a_shift_by_size():
    check_pipeline("sd3", "flow-euler", {"use_dynamic_shifting": True}, prompt=PROMPTS[0], output_type="latent")


def test_the_other_components_are_reloaded_unchanged():
    check_components("sd3")


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_pipeline():
    given, without, pooled, without_pooled = chain("sd3").original.encode_prompt(list(PROMPTS), None, None)
    check_prompts("sd3", (given, pooled), (without, without_pooled))


@torch.no_grad()
def test_without_the_third_text_encoder_its_tokens_are_zero():
    given, without, pooled, without_pooled = chain("sd3-without-t5").original.encode_prompt(list(PROMPTS), None, None)
    check_prompts("sd3-without-t5", (given, pooled), (without, without_pooled))
    assert not given[:, 77:].any()
    with pytest.raises(InputError, match=r"has 82 tokens; the text encoder takes 77"):
        conditioner_of(chain("sd3-without-t5").source, prompts=("a" * 80,))


def test_a_pipeline_without_its_third_text_encoder_comes_back_without_it():
    check_components("sd3-without-t5")
    assert chain("sd3-without-t5").exact.text_encoder_3 is None
    check_pipeline("sd3-without-t5", prompt=PROMPTS[0], output_type="latent")


def test_a_flow_starts_at_the_length_of_the_schedule_and_no_higher():
    denoiser = chain("sd3").quantized
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12), torch.zeros(1, 16)
    assert denoiser(*inputs, 1000.0).sample.isfinite().all()
    with pytest.raises(InputError, match="timestep 1001 is outside the schedule; expected 0 to 1000"):
        denoiser(*inputs, 1001)


def test_positions_bound_the_size():
    family, config, _ = tiny_model("sd3")
    assert family.limits(config) == {"height": 24, "width": 24}
    with pytest.raises(InputError, match=r"--height 8:8:26: this model has positions up to 24"):
        build_engine(
            home("sd3").parent / "float" / "onnx",
            home("sd3").parent / "none",
            backend="ort",
            options=BuildOptions(profile={"height": ShapeRange(8, 8, 26)}),
        )
    with pytest.raises(InputError, match=r"height 24 is outside the engine's profile 8:8:16\. .* build again with --height 8:8:24"):
        chain("sd3").exact(PROMPTS[0], height=192, width=64, num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize("name", ["block_controlnet_hidden_states", "joint_attention_kwargs", "skip_layers"])
def test_an_argument_without_an_input_is_refused(name):
    given = {"joint_attention_kwargs": {"scale": 0.5}, "skip_layers": [1]}.get(name, [torch.zeros(1)])
    with pytest.raises(UnsupportedError, match=f"no input '{name}'"):
        chain("sd3").denoiser(torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12), torch.zeros(1, 16), 1, **{name: given})


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(
        UnsupportedError, match=r"'ddim' cannot sample this model, which was trained by flow matching. Choose flow-euler, flow-heun"
    ):
        scheduler_named("ddim", FLOW_SCHEDULER)

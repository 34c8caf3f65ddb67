import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines import scheduler_named, schedulers_for
from tests.conftest import FLOW_SCHEDULER, tiny_model
from tests.edm_deploy.models.chain import chain, check_float_engine, check_pipeline, check_quantized_engine, tiny_vae

pytest.importorskip("onnxruntime")


def test_the_float_engine_is_the_model_at_two_resolutions_and_mixed_timesteps():
    check_float_engine("sd3")


def test_the_quantized_engine_is_the_reference():
    check_quantized_engine("sd3")


@pytest.mark.parametrize("scheduler", schedulers_for(FLOW_SCHEDULER))
def test_it_drops_into_its_pipeline_with_every_scheduler(scheduler):
    generator = torch.Generator().manual_seed(1)
    pipeline = StableDiffusion3Pipeline(
        chain("sd3").model, scheduler_named(scheduler, FLOW_SCHEDULER), tiny_vae(), None, None, None, None, None, None
    )
    embeds = {name: torch.randn(1, 9, 12, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pooled = {name: torch.randn(1, 16, generator=generator) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    check_pipeline(pipeline, "sd3", **embeds, **pooled, height=64, width=128, output_type="latent")


def test_a_flow_starts_at_the_length_of_the_schedule_and_no_higher():
    denoiser = chain("sd3").quantized
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12), torch.zeros(1, 16)
    assert denoiser(*inputs, 1000.0).sample.isfinite().all()
    with pytest.raises(InputError, match="timestep 1001 lies outside the schedule; expected 0 to 1000"):
        denoiser(*inputs, 1001)


def test_positions_bound_the_size():
    family, config, _ = tiny_model("sd3")
    assert family.limits(config) == {"height": 24, "width": 24}


@pytest.mark.parametrize("name", ["block_controlnet_hidden_states", "joint_attention_kwargs", "skip_layers"])
def test_what_the_graph_does_not_carry_is_refused(name):
    given = {"joint_attention_kwargs": {"scale": 0.5}, "skip_layers": [1]}.get(name, [torch.zeros(1)])
    with pytest.raises(UnsupportedError, match=f"no input '{name}'"):
        chain("sd3").exact(torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12), torch.zeros(1, 16), 1, **{name: given})


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(
        UnsupportedError, match=r"'ddim' cannot sample this model, which was trained by flow matching. Choose flow-euler, flow-heun"
    ):
        scheduler_named("ddim", FLOW_SCHEDULER)

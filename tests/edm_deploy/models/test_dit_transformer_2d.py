import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.schedulers import schedulers_for
from tests.conftest import SCHEDULER, tiny_model
from tests.edm_deploy.models.chain import chain, check_components, check_float_engine, check_pipeline, check_quantized_engine

pytest.importorskip("onnxruntime")


def test_the_float_engine_is_the_model_at_two_resolutions_and_mixed_timesteps():
    check_float_engine("dit")


def test_the_quantized_engine_is_the_reference():
    check_quantized_engine("dit")


@pytest.mark.parametrize("scheduler", [None, *schedulers_for(SCHEDULER)])
def test_its_pipeline_comes_back_with_every_scheduler(scheduler):
    check_pipeline("dit", scheduler, class_labels=[3, 999], output_type="np")


def test_the_other_components_are_reloaded_unchanged():
    check_components("dit")
    assert chain("dit").exact.get_label_ids(["goldfish"]) == [1]


def test_what_modulates_every_token_is_w8a8_and_the_scheduler_gets_no_variance():
    family, config, model = tiny_model("dit")
    placed = {name: family.placement(name) for name in family.sites(model)}
    quantized = {name.split(".", 2)[2] for name, placement in placed.items() if placement == "quantize"}
    assert quantized == {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"}
    assert family.group("transformer_blocks.0.norm1.linear") == "time_embedding"
    output = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert family.prediction(config, output).flatten().tolist() == [0, 1, 2, 3]
    assert family.unconditional(config, torch.Generator())["class_labels"].tolist() == [1000]


def test_misuse_is_one_clear_error():
    denoiser = chain("dit").denoiser
    sample, labels = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    with pytest.raises(InputError, match="timestep 1000 is outside the schedule"):
        denoiser(sample, 1000, labels)
    with pytest.raises(InputError, match="height 9 is not a multiple of 2"):
        denoiser(torch.zeros(1, 4, 9, 8), 1, labels)
    with pytest.raises(UnsupportedError, match=r"cross_attention_kwargs.*no cross-attention"):
        denoiser(sample, 1, labels, {"scale": 0.5})

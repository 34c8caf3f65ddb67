import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy.pipelines.guidance import EXTRA_CHANNELS, Conditioner, Conditioning
from tests.conftest import tiny_model


def test_the_unconditional_half_comes_first_and_only_some_inputs_differ():
    conditioning = Conditioning({"label": torch.tensor([3, 4]), "size": torch.tensor([8, 9])}, {"label": torch.tensor([0])}, scale=2.0)
    inputs = conditioning.inputs(torch.zeros(2, 1), torch.tensor([5.0, 6.0]))
    assert inputs["label"].tolist() == [0, 0, 3, 4]
    assert inputs["size"].tolist() == [8, 9, 8, 9]
    assert inputs["timestep"].tolist() == [5, 6, 5, 6]


def test_guidance_extrapolates_from_the_unconditional_prediction():
    conditioning = Conditioning({}, {"label": torch.tensor([0])}, scale=3.0)
    assert conditioning.combine(torch.tensor([1.0, 10.0, 2.0, 8.0])).tolist() == [1 + 3 * 1, 10 + 3 * -2]


def test_a_scale_of_one_runs_one_half_only():
    conditioning = Conditioning({}, {"label": torch.tensor([0])}, scale=1.0)
    assert len(conditioning.inputs(torch.zeros(2, 1), torch.zeros(2))["sample"]) == 2
    assert conditioning.combine(torch.tensor([1.0, 2.0])).tolist() == [1, 2]


def test_extra_channels_are_concatenated_to_the_sample():
    inputs = Conditioning({EXTRA_CHANNELS: torch.ones(2, 5, 4, 4)}).inputs(torch.zeros(2, 4, 4, 4), torch.zeros(2))
    assert set(inputs) == {"sample", "timestep"}
    assert inputs["sample"].mean((0, 2, 3)).tolist() == [0] * 4 + [1] * 5


def test_prompts_are_drawn_from_the_encoded_ones():
    family, config, _ = tiny_model("unet2d-condition")
    encoded = torch.arange(3.0).reshape(3, 1, 1).expand(3, 77, 12)
    drawn = Conditioner(family, config, encoded={"encoder_hidden_states": encoded}).draw(50, torch.Generator().manual_seed(0))
    assert set(drawn["encoder_hidden_states"][:, 0, 0].tolist()) == {0, 1, 2}


def test_a_model_without_guidance_refuses_a_scale():
    family, config, _ = tiny_model("unet2d")
    with pytest.raises(InputError, match=r"guidance is 2\.0, but UNet2DModel is not guided"):
        Conditioner(family, config, scale=2.0)

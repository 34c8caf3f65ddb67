import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.meta_model import meta_model
from tests.conftest import TINY_CLASS_UNET, TINY_UNET, tiny_inputs, tiny_model

FAMILY = family_named("unet2d")


def test_ends_time_embedding_shortcuts_and_downsamplers_stay_at_eight_bits():
    sites = FAMILY.sites(meta_model(FAMILY, TINY_UNET))
    kept = [name for name in sites if FAMILY.placement(name) == "w8a8"]
    ends, bypassing = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"], ("conv_shortcut", "downsamplers")
    assert [name for name in kept if not any(part in name for part in bypassing)] == ends
    assert sorted(set(kept) - set(ends)) == sorted(name for name in sites if any(part in name for part in bypassing)) != []


def test_every_convolution_and_linear_is_a_site():
    meta = meta_model(FAMILY, TINY_UNET)
    layers = [name for name, layer in meta.named_modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    assert list(FAMILY.sites(meta)) == layers
    assert len(layers) > 20


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ["sample", "timestep"]),
        ({"num_class_embeds": 5}, ["sample", "timestep", "class_labels"]),
        ({"class_embed_type": "timestep"}, ["sample", "timestep", "class_labels"]),
        ({"class_embed_type": "identity"}, ["sample", "timestep", "class_labels"]),
    ],
    ids=["unconditional", "embedding", "timestep", "identity"],
)
def test_labels_are_an_input_where_the_model_takes_them(change, names):
    config = TINY_UNET | change
    inputs = FAMILY.inputs(config)
    assert [declared.name for declared in inputs] == names
    model = FAMILY.build(config).eval()
    conditioning = FAMILY.random_conditioning(config, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = FAMILY.forward(model, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3.0, 900.0])} | conditioning)
    assert prediction.shape == (2, 3, 8, 8)


def test_random_labels_are_within_the_classes():
    labels = FAMILY.random_conditioning(TINY_CLASS_UNET, 64, torch.Generator().manual_seed(0))["class_labels"]
    assert set(labels.tolist()) == set(range(5))


def test_a_model_indexed_by_noise_level_is_refused():
    with pytest.raises(UnsupportedError, match="indexed by noise level, not by timestep"):
        FAMILY.build(TINY_UNET | {"time_embedding_type": "fourier"})


def test_a_learned_time_embedding_takes_rounded_timesteps():
    config = TINY_UNET | {"time_embedding_type": "learned", "num_train_timesteps": 1000}
    model = FAMILY.build(config).eval()
    with torch.no_grad():
        assert FAMILY.forward(model, {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([3.4])}).isfinite().all()


def test_a_config_that_diffusers_refuses_is_one_clear_error():
    with pytest.raises(UnsupportedError, match="diffusers cannot build UNet2DModel"):
        FAMILY.build(TINY_UNET | {"down_block_types": ["DownBlock2D"]})


def test_the_diffusers_signature_is_bound_by_position_and_by_name():
    sample, step = torch.zeros(1), 5
    assert FAMILY.bind(TINY_UNET, (sample, step), {"return_dict": False}) == {"sample": sample, "timestep": step}
    assert FAMILY.bind(TINY_UNET, (sample,), {"timestep": step, "class_labels": None}) == {"sample": sample, "timestep": step}


def test_an_argument_without_an_input_is_refused():
    with pytest.raises(UnsupportedError, match="no input 'class_labels'; it takes sample, timestep"):
        FAMILY.bind(TINY_UNET, (1, 2, 3), {})
    with pytest.raises(UnsupportedError, match="needs 'class_labels'"):
        FAMILY.bind(TINY_CLASS_UNET, (1, 2), {})


def test_the_graph_s_forward_is_that_of_the_model():
    _, _, model = tiny_model("unet2d")
    inputs = tiny_inputs("unet2d")
    assert torch.equal(FAMILY.forward(model, inputs), model(inputs["sample"], inputs["timestep"]).sample)

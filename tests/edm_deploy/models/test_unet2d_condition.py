import pytest
import torch

from calibration import RunOptions, fit
from calibration.recipes.efficientdm import EfficientDM
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.meta_model import meta_model
from edm_deploy.pipelines.prompt_encoding import conditioner_of, encode
from edm_deploy.pipelines.schedulers import schedulers_for
from tests.conftest import SCHEDULER, TINY_CONDITION_UNET, TINY_SDXL, tiny_inputs
from tests.edm_deploy.models.chain import (
    PROMPTS,
    chain,
    check_components,
    check_float_engine,
    check_pipeline,
    check_quantized_engine,
    home,
)
from tests.tiny_unets import LABELS, tiny_pipeline

pytest.importorskip("onnxruntime")

FAMILY = family_named("unet2d-condition")
LDM = pytest.param("ldm", marks=pytest.mark.extended)
EXTENDED = [pytest.param("sd2", marks=pytest.mark.extended), pytest.param("inpainting", marks=pytest.mark.extended)]  # a trace each
VARIANTS = ["sdxl", LDM, *EXTENDED]
WIDER = {"height": 16, "width": 32}  # pixels, two a latent


def test_tokens_are_an_input_of_any_length():
    assert FAMILY.inputs(TINY_CONDITION_UNET)[2].dims == ("batch", "tokens", 12)


def test_the_cross_attention_is_quantized():
    sites = FAMILY.sites(meta_model(FAMILY, TINY_CONDITION_UNET))
    assert any(name.endswith("attn2.to_k") and FAMILY.placement(name) == "quantize" for name in sites)


@pytest.mark.parametrize("key", ["addition_embed_type", "encoder_hid_dim_type", "class_embed_type"])
def test_conditioning_that_is_not_supported_is_refused(key):
    with pytest.raises(UnsupportedError, match=f"{key}='text'"):
        FAMILY.build(TINY_CONDITION_UNET | {key: "text"})


def test_a_width_that_differs_by_block_is_refused():
    with pytest.raises(UnsupportedError, match="differs by block"):
        FAMILY.inputs(TINY_CONDITION_UNET | {"cross_attention_dim": [12, 24]})


def test_empty_added_conditions_of_a_pipeline_are_nothing():
    given = FAMILY.bind(TINY_CONDITION_UNET, (1, 2), {"encoder_hidden_states": 3, "added_cond_kwargs": {}, "timestep_cond": None})
    assert given == {"sample": 1, "timestep": 2, "encoder_hidden_states": 3}


def test_random_tokens_have_the_model_width():
    assert FAMILY.random_conditioning(TINY_CONDITION_UNET, 2, torch.Generator())["encoder_hidden_states"].shape == (2, 77, 12)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_float_engine_is_the_model_at_two_resolutions_and_mixed_timesteps(kind):
    check_float_engine(kind)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_quantized_engine_is_the_reference(kind):
    check_quantized_engine(kind)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_other_components_are_reloaded_unchanged(kind):
    check_components(kind)


def arguments(kind):
    """What a pipeline of this kind is called with; all are guided by default."""
    if kind == "ldm":
        return {"class_labels": [0, LABELS - 1], "output_type": "latent"}
    given = {"prompt": list(PROMPTS), "negative_prompt": ["blurred", ""], "output_type": "latent"}
    if kind == "inpainting":
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 4:12, 2:10] = 1
        given |= {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "mask_image": mask}
    return given


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("scheduler", [None, *schedulers_for(SCHEDULER)])
def test_its_pipeline_comes_back_with_every_scheduler(kind, scheduler):
    check_pipeline(kind, scheduler, **arguments(kind))


@pytest.mark.parametrize("kind", ["sdxl", *EXTENDED])
def test_its_pipeline_comes_back_at_another_resolution(kind):
    check_pipeline(kind, **arguments(kind) | WIDER)


@pytest.mark.parametrize("kind", VARIANTS)
def test_its_pipeline_comes_back_unguided_and_decoded(kind):
    check_pipeline(kind, **arguments(kind) | {"guidance_scale": 1.0, "output_type": "np"})


def test_sdxl_s_sizes_may_differ_between_the_halves_of_guidance():
    sizes = {"original_size": (1024, 1024), "crops_coords_top_left": (8, 0), "target_size": (768, 512)}
    negative = {"negative_original_size": (64, 64), "negative_crops_coords_top_left": (0, 9), "negative_target_size": (2049, 2049)}
    given = {"prompt": PROMPTS[0], "output_type": "latent"}
    check_pipeline("sdxl", **given, **sizes, **negative, num_images_per_prompt=2)
    pipeline, given = chain("sdxl").exact, given | {"num_inference_steps": 2}
    made = [
        pipeline(**given, **extra, generator=torch.Generator().manual_seed(0), return_dict=False)[0] for extra in (sizes, sizes | negative)
    ]
    assert (made[0] - made[1]).abs().max() > 1e-3  # far above float32's rounding: the engine sees them


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "sd2", "inpainting", "sdxl"])
def test_prompts_are_encoded_as_by_the_pipeline(kind):
    expected = tiny_pipeline(kind).encode_prompt(list(PROMPTS), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    given, without = encode(home(kind), FAMILY, TINY_SDXL if kind == "sdxl" else TINY_CONDITION_UNET, PROMPTS)
    names = list(FAMILY.text_inputs)[: len(expected) // 2]
    assert list(given) == list(without) == names
    for index, name in enumerate(names):
        assert torch.equal(given[name], expected[2 * index])
        assert torch.equal(without[name], expected[2 * index + 1][:1])


@pytest.mark.parametrize("kind", ["sdxl", *EXTENDED])
def test_a_calibration_is_conditioned_on_prompts(kind):
    provenance = chain(kind).artifact.provenance
    assert provenance["conditioning"].startswith("2 prompts")
    assert provenance["guidance"] == {"sdxl": 5.0}.get(kind, 7.5)


@pytest.mark.parametrize("kind", [LDM, *EXTENDED])
def test_it_is_fine_tuned(kind, tmp_path):
    """Those of TINY are so in the contracts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    recipe = EfficientDM(rows=2, steps=2, batch=2, calibration_samples=2, rank=2)
    artifact = fit(chain(kind).source, recipe, RunOptions(prompts=None if kind == "ldm" else prompts))
    assert artifact.scheme == "W4A4"
    assert all(site.codes.any() for site in artifact.sites.values())


def test_the_empty_prompt_of_sdxl_is_zero():
    """`force_zeros_for_empty_prompt`, the default of its pipeline."""
    _, without = encode(home("sdxl"), FAMILY, TINY_SDXL, PROMPTS)
    assert not any(value.any() for value in without.values())


def test_a_prompt_that_two_text_encoders_cut_off_is_refused():
    with pytest.raises(InputError, match=r"has 82 tokens; the text encoder takes 77\. Shorten it"):
        conditioner_of(chain("sdxl").source, prompts=("a" * 80,))


@pytest.mark.extended
def test_a_label_is_encoded_by_the_class_embedder():
    made = chain("ldm")
    table = made.original.class_embedder
    conditioner = conditioner_of(made.source)
    tokens = conditioner.encoded["encoder_hidden_states"]
    assert torch.equal(tokens, table(torch.arange(LABELS)))
    assert torch.equal(conditioner.unconditional["encoder_hidden_states"], table(torch.tensor([LABELS])))
    assert made.artifact.provenance["conditioning"] == "5 labels of the class embedder"
    assert made.artifact.provenance["guidance"] == 1.5


def test_a_mask_is_concatenated_to_the_latents_and_hides_the_image():
    beside = FAMILY.extra_channels(TINY_CONDITION_UNET | {"in_channels": 9}, 3, torch.Generator().manual_seed(0))
    mask, image = beside[:, :1], beside[:, 1:]
    assert beside.shape == (3, 5, 8, 8)
    assert mask.unique().tolist() in ([0, 1], [1])
    assert not (image * mask).any()
    assert FAMILY.latent_shape(TINY_CONDITION_UNET | {"in_channels": 9}) == (4, 8, 8)


def test_a_resolution_outside_the_profile_is_refused_with_the_mend():
    with pytest.raises(InputError, match=r"height 24 is outside the engine's profile 8:8:16\. .* build again with --height 8:8:24"):
        chain("sdxl").exact(PROMPTS[0], height=48, width=16, num_inference_steps=1, output_type="latent")


def test_sdxl_without_its_added_conditions_is_refused():
    given = tiny_inputs("sdxl")
    with pytest.raises(UnsupportedError, match="The engine needs 'text_embeds'"):
        chain("sdxl").denoiser(given["sample"], given["timestep"], given["encoder_hidden_states"])


@pytest.mark.parametrize("name", ["timestep_cond", "down_block_additional_residuals", "encoder_attention_mask", "cross_attention_kwargs"])
def test_an_argument_without_an_input_is_refused(name):
    value = {"scale": 0.5} if name == "cross_attention_kwargs" else torch.zeros(1)
    with pytest.raises(UnsupportedError, match=f"The engine has no input '{name}'"):
        FAMILY.bind(TINY_CONDITION_UNET, (1, 2, 3), {name: value})


def test_a_guidance_scale_embedded_with_the_timestep_is_refused():
    with pytest.raises(UnsupportedError, match=r"time_cond_proj_dim=8: a guidance scale embedded with the timestep \(LCM\)"):
        FAMILY.build(TINY_CONDITION_UNET | {"time_cond_proj_dim": 8})


def test_the_widths_that_sdxl_pipelines_check_are_those_of_the_model():
    denoiser = chain("sdxl").denoiser
    assert denoiser.add_embedding.linear_1.in_features == 6 * denoiser.config.addition_time_embed_dim + 8
    assert denoiser.config.time_cond_proj_dim is None


def test_no_row_of_the_random_conditioning_shares_memory_with_another():
    """A pool of trajectories writes what a restarted sample is told into its row."""
    drawn = FAMILY.random_conditioning(TINY_SDXL, 2, torch.Generator())
    assert drawn["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    drawn["time_ids"][0] = 0
    assert drawn["time_ids"][1].any()

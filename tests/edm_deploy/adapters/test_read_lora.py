import pytest
import torch

from edm_deploy.adapters.lora_file import LoraFile, scaling_of
from edm_deploy.adapters.read_lora import LoraTarget, lora_from_diffusers, read_lora
from edm_deploy.errors import InputError
from tests.conftest import tiny_model
from tests.tiny_loras import kohya_tensors, peft_tensors

KINDS = ["unet2d", "unet2d-condition", "sdxl", "sd3", "flux", "dit"]


def target(kind, rank=8):
    family, config, _ = tiny_model(kind)
    return LoraTarget(family, config, rank)


@pytest.mark.parametrize("kind", KINDS)
def test_one_lora_by_the_names_of_each_trainer_is_one_lora(kind):
    of = target(kind)
    peft = peft_tensors(of.shapes(), rank=3)
    expected = read_lora(peft, of)
    assert set(expected.layers) == set(of.shapes()) and expected.rank == 3
    prefixed = {f"{of.family.component}.{name}": value for name, value in peft.items()}
    old = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for name, value in prefixed.items()}
    for tensors in (prefixed, old, {f"base_model.model.{name}": value for name, value in peft.items()}, kohya_tensors(peft, alpha=1.5)):
        found = read_lora(tensors, of)
        assert set(found.layers) == set(expected.layers)
        assert all(torch.allclose(found.layers[name].delta(), expected.layers[name].delta(), atol=1e-6) for name in found.layers)


def test_kohyas_names_of_the_original_sdxl_unet_are_mapped_by_diffusers():
    of = target("sdxl")
    names = {  # of a UNet with one layer a block
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "lora_unet_input_blocks_3_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
        "lora_unet_middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    }
    shapes = of.shapes()
    tensors = {}
    for kohya, name in names.items():
        outputs, *rest = shapes[name]
        tensors |= {
            f"{kohya}.lora_down.weight": torch.ones(2, *rest),
            f"{kohya}.lora_up.weight": torch.ones(outputs, 2, *[1] * (len(rest) - 1)),
        }
        tensors[f"{kohya}.alpha"] = torch.tensor(1.0)
    found = read_lora(tensors, of)
    assert set(found.layers) == set(names.values())
    assert all(bool((update.delta() == 1).all()) for update in found.layers.values())  # two ranks, times alpha / rank


def test_kohyas_names_of_the_original_flux_are_split_by_diffusers():
    of = target("flux")
    width = of.shapes()["transformer_blocks.0.attn.to_q"][0]
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.arange(3.0).repeat_interleave(width)[:, None]
    found = read_lora(
        {f"{stem}.lora_down.weight": torch.ones(1, width), f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}, of
    )
    deltas = {name: update.delta().unique().tolist() for name, update in found.layers.items()}
    assert deltas == {f"transformer_blocks.0.attn.to_{part}": [float(number)] for number, part in enumerate("qkv")}


def test_alpha_is_peft_configured_or_from_the_file():
    of = target("unet2d")
    name, shape = next(iter(of.shapes().items()))
    tensors = peft_tensors({name: shape}, rank=2)
    plain = read_lora(tensors, of).layers[name].delta()
    configured = read_lora(LoraFile("x", tensors, {"unet.": scaling_of({"lora_alpha": 6, "r": 2}, "x")}), of).layers[name].delta()
    torch.testing.assert_close(configured, 3 * plain)
    given = lora_from_diffusers(tensors, {f"{name}.alpha": 1.0}, {}, of).layers[name].delta()
    torch.testing.assert_close(given, plain / 2)


def test_a_loha_becomes_a_lora_of_the_free_rank_and_states_its_error():
    of = target("unet2d-condition", rank=4)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    stem, (outputs, inputs) = f"lora_unet_{name.replace('.', '_')}", of.shapes()[name]
    generator = torch.Generator().manual_seed(0)
    parts = {
        f"hada_w{n}_{side}": torch.randn(shape, generator=generator)
        for n in (1, 2)
        for side, shape in (("a", (outputs, 2)), ("b", (2, inputs)))
    }
    tensors = {f"{stem}.{key}": value for key, value in parts.items()} | {f"{stem}.alpha": torch.tensor(1.0)}
    found = read_lora(tensors, of)
    expected = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) / 2
    torch.testing.assert_close(found.layers[name].delta(), expected, atol=1e-4, rtol=0)  # of rank 2 x 2
    assert found.notes[0].startswith(
        "1 LoHa or LoKr updates became LoRAs of rank 4 or less by SVD; largest error 0.0% of the update, in mid_block"
    )
    assert read_lora(tensors, target("unet2d-condition", rank=1)).layers[name].rank == 1


def test_text_encoders_are_ignored_with_a_note_and_all_else_must_fit():
    of = target("unet2d")
    tensors = peft_tensors(of.shapes(), rank=2)
    text = {"text_encoder.q_proj.lora_A.weight": torch.zeros(2, 4), "text_encoder.q_proj.lora_B.weight": torch.zeros(4, 2)}
    assert read_lora(tensors | text, of).notes == ("2 tensors of text encoders are ignored, because an engine is a denoiser.",)
    name = next(iter(of.shapes()))
    refused = {
        r"has 'down_blocks\.7\.x\.lora_A\.weight' and 1 more, which names no layer of this UNet2DModel": {
            "down_blocks.7.x.lora_A.weight": torch.zeros(1),
            "zzz": torch.zeros(1),
        },
        "is a DoRA": {f"{name}.lora_magnitude_vector.weight": torch.zeros(1)},
        "has no up": {f"{name}.lora_B.weight": None},
        "is for another base model: layer": {f"{name}.lora_A.weight": torch.zeros(2, 99, 3, 3)},
        "has ranks 5 and 2": {f"{name}.lora_A.weight": torch.zeros(5, 3, 3, 3)},
        "holds NaN or infinity": {f"{name}.lora_B.weight": torch.full_like(tensors[f"{name}.lora_B.weight"], torch.nan)},
    }
    for message, change in refused.items():
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        with pytest.raises(InputError, match=f"^The LoRA.*{message}"):
            read_lora(changed, of)

import torch

from edm_deploy.adapters.layer_names import parse_names

PUBLISHED = ("down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0", "conv_in")
ONE = torch.zeros(1)


def test_every_trainers_names_lead_to_the_published_layer():
    names = {
        "down_blocks.0.attn1.to_q.lora_A.weight": "down",
        "unet.down_blocks.0.attn1.to_q.lora.up.weight": "up",
        "base_model.model.down_blocks.0.attn1.to_q.lora_B.default.weight": "up",
        "unet.down_blocks.0.attn1.processor.to_q_lora.down.weight": "down",
        "transformer.down_blocks.0.attn1.to_q.alpha": "alpha",
        "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": "down",
        "lora_unet_down_blocks_0_attn1_to_q.lora_mid.weight": "mid",
        "lora_unet_down_blocks_0_attn1_to_q.hada_w1_a": "hada_w1_a",
        "base_model.model.down_blocks.0.attn1.to_q.lokr_w2_b": "lokr_w2_b",
    }
    for name, factor in names.items():
        parsed = parse_names({name: ONE}, PUBLISHED)
        assert {layer: set(content) for layer, content in parsed.layers.items()} == {PUBLISHED[0]: {factor}}, name
    assert list(parse_names({"down_blocks.0.attn1.processor.to_out_lora.up.weight": ONE}, PUBLISHED).layers) == [PUBLISHED[1]]
    assert list(parse_names({"lora_unet_conv_in.lora_up.weight": ONE}, PUBLISHED).layers) == ["conv_in"]


def test_text_encoders_and_unknown_names_are_told_apart():
    names = ["text_encoder.layers.0.q_proj.lora_A.weight", "lora_te1_text_model_mlp_fc1.alpha", "lora_te_x.lora_up.weight"]
    unknown = ["down_blocks.9.to_q.lora_A.weight", "lora_unet_nothing.lora_up.weight", "conv_in.diff_b", "conv_in.lora_B.bias"]
    parsed = parse_names(dict.fromkeys([*names, *unknown], ONE), PUBLISHED)
    assert (parsed.text, parsed.unknown, parsed.layers) == (names, unknown, {})

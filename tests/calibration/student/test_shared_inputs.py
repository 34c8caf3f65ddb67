import pytest

from calibration.student.shared_inputs import meta_inputs, shared_inputs
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite
from tests.conftest import tiny_inputs, tiny_model


def test_query_key_and_value_share_the_input_of_the_query():
    family, config, _ = tiny_model("unet2d")
    first = shared_inputs(family, config, PUBLISHED)
    attention = "mid_block.attentions.0"
    assert {first[f"{attention}.to_{letter}"] for letter in "qkv"} == {f"{attention}.to_q"}
    assert first[f"{attention}.to_out.0"] == f"{attention}.to_out.0"


def test_keys_and_values_of_all_cross_attentions_share_the_text():
    family, config, _ = tiny_model("unet2d-condition")
    first = shared_inputs(family, config, PUBLISHED)
    text = [name for name in first if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(text) > 2
    assert {first[name] for name in text} == {text[0]}


def test_segments_of_a_split_layer_are_sites_with_different_inputs():
    family, config, _ = tiny_model("unet2d")
    name = "up_blocks.0.resnets.1.conv_shortcut"
    first = shared_inputs(family, config, NetworkRewrite({name: (16, 8)}))
    assert [first[f"{name}.segment{part}"] for part in range(2)] == [f"{name}.segment{part}" for part in range(2)]


@pytest.mark.parametrize("kind", ["unet2d", "sdxl", "flux"])
def test_meta_inputs_have_the_names_and_ranks_of_real_ones_and_no_memory(kind):
    family, config, _ = tiny_model(kind)
    inputs, real = meta_inputs(family, config, batch=3), tiny_inputs(kind, batch=3)
    assert {name: value.ndim for name, value in inputs.items()} == {name: value.ndim for name, value in real.items()}
    assert all(value.is_meta and len(value) == 3 for value in inputs.values())

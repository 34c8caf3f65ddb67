import copy

import pytest
import torch

from edm_deploy.network.fold_rotations import attention_values, fold_rotations
from edm_deploy.network.restructure import NetworkRewrite, restructure
from tests.conftest import tiny_inputs, tiny_model


@pytest.mark.parametrize(("kind", "attentions"), [("unet2d", 4), ("sdxl", 16), ("dit", 2), ("pixart", 4), ("sd3", 3), ("flux", 1)])
def test_rotating_the_values_rotates_what_reads_attention(kind, attentions):
    family, _, model = tiny_model(kind)
    inputs = tiny_inputs(kind)
    expected = family.forward(model, inputs)
    found = attention_values(model)
    assert len(found) == attentions
    before = copy.deepcopy(model.state_dict())
    rotated = {name: 4 for values in found for name in values.read_by if values.head % 4 == 0}
    assert fold_rotations(model, rotated) == {} and rotated
    changed = {name.rpartition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for values in found for name in (*values.written_by, *values.read_by)}
    torch.testing.assert_close(family.forward(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_is_left():
    _, _, model = tiny_model("sd3")
    first, second, last = attention_values(model)
    assert first.read_by == ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out") and first.head == 8
    assert last.written_by[1].endswith("add_v_proj") and last.read_by == ("transformer_blocks.1.attn.to_out.0",), (
        "its text stream ends here"
    )
    half = {first.read_by[0]: 8}
    assert fold_rotations(model, half) == half, "the other stream of the joint attention would be rotated too"
    both = {first.read_by[0]: 8, first.read_by[1]: 4}
    assert fold_rotations(model, both) == both
    wide = {second.read_by[0]: 16}
    assert fold_rotations(model, wide) == wide, "a block of two heads"
    other = {"transformer_blocks.0.ff.net.2": 8}
    assert fold_rotations(model, other | {second.read_by[0]: 8}) == other


def test_an_attention_whose_layers_are_split_is_left_alone():
    _, _, model = tiny_model("dit")
    restructure(model, NetworkRewrite({"transformer_blocks.0.attn1.to_out.0": (8, 8), "transformer_blocks.1.attn1.to_v": (8, 8)}))
    assert attention_values(model) == []

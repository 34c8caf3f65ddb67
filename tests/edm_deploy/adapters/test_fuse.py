from dataclasses import replace

import pytest
import torch

from edm_deploy.adapters.fuse import with_loras
from edm_deploy.adapters.lora import LayerUpdate, Lora
from edm_deploy.adapters.site_weights import BranchTarget, adapters_of, site_factors
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import UnsupportedError
from edm_deploy.network.adapter_inputs import SLOT_SCALES, down_input, up_input
from tests.conftest import tiny_inputs
from tests.edm_deploy.adapters.test_site_weights import BLOCK, TO_OUT, TO_V, UP, after, before  # noqa: F401  # fixtures
from tests.tiny_loras import peft_tensors

SPLIT = f"{BLOCK}.ff.net.0.proj"


def lora(artifact, layers, rank, seed=0):
    from edm_deploy.adapters.read_lora import LoraTarget, read_lora

    target = LoraTarget(artifact.family_object, artifact.config, 8)
    return read_lora(peft_tensors({name: shape for name, shape in target.shapes().items() if name in layers}, rank=rank, seed=seed), target)


def test_fused_it_computes_what_it_does_in_rank_slots(after):  # noqa: F811
    inputs = tiny_inputs("dit")
    style = lora(after, {TO_OUT, TO_V, UP, SPLIT}, 3)
    adapters = adapters_of(after, rank=3, pattern=".")
    values = adapters.zeros(torch.float32, torch.device("cpu"))
    for site, update in BranchTarget(adapters, after.structure, site_factors(after, adapters)).site_weights(style).items():
        values |= {down_input(site): update.down, up_input(site): update.up}
    expected = Reference(after, values)(inputs | {SLOT_SCALES: torch.full((3, 3), 0.5)})
    fused = with_loras(after, [(style, 0.5)])
    fused.validate()
    assert set(fused.structure.branches) == {TO_OUT, TO_V, UP, f"{SPLIT}.segment0", f"{SPLIT}.segment1"}
    assert fused.provenance["loras"] == ["The LoRA:0.5"]
    found, plain = Reference(fused)(inputs), Reference(after)(inputs)
    # A branch's weights have float16 values; a code that flips moves the rest, but by far less than the LoRA does.
    assert (found - expected).norm() < 0.1 * (expected - plain).norm()


def test_a_second_lora_makes_the_branch_wider_up_to_the_rank_of_the_weight(before):  # noqa: F811
    one, two = lora(before, {TO_V}, 3, seed=1), lora(before, {TO_V}, 3, seed=2)
    fused = with_loras(before, [(one, 1.0), (two, -0.5)])
    assert fused.structure.branches == {TO_V: 6}
    down, up = (fused.params[f"{TO_V}.branch.{half}.weight"] for half in ("down", "up"))
    expected = one.layers[TO_V].delta() - 0.5 * two.layers[TO_V].delta()
    torch.testing.assert_close(up @ down, expected, atol=1e-3, rtol=0)
    wide = with_loras(before, [(lora(before, {TO_V}, 12, seed=1), 1.0), (two, 1.0)])
    assert wide.structure.branches == {TO_V: 12 + 3} or wide.structure.branches[TO_V] <= 16
    wide.validate()


def test_a_layer_that_is_not_quantized_gets_the_update_in_its_weight(before):  # noqa: F811
    site = before.sites[TO_V]
    weight = site.codes.float() * site.weight_scale[:, None]
    sites = {name: value for name, value in before.sites.items() if name != TO_V}
    floating = replace(before, sites=sites, params={**before.params, f"{TO_V}.weight": weight})
    update = LayerUpdate(torch.ones(1, 16), torch.ones(16, 1))
    assert torch.equal(with_loras(floating, [(Lora("x", {TO_V: update}), 0.5)]).params[f"{TO_V}.weight"], weight + 0.5)
    with pytest.raises(UnsupportedError, match="is not quantized and other scales were folded"):
        with_loras(replace(floating, absorbed={f"{TO_OUT}.input": torch.ones(16)}), [(Lora("x", {TO_V: update}), 0.5)])

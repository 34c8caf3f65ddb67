from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from edm_deploy.adapters.read_lora import LoraTarget, read_lora
from edm_deploy.adapters.site_weights import BranchTarget, adapters_of, check_factors, site_factors
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.fold_pre_scales import fold_pre_scales
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.network.adapter_inputs import SLOT_SCALES, AdapterInputs, down_input, up_input
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.network.rotation import gain, rotate
from tests.conftest import artifact_by_hand, tiny_inputs
from tests.tiny_loras import peft_tensors

BLOCK = "transformer_blocks.0"
BLOCK_SIZE = 8  # of rotations; an odd power of two, whose matrix is not orthogonal
TO_Q, TO_V, TO_OUT, UP = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.2"


def restructured() -> Artifact:
    """A DiT with a split layer, a rotated one, and two pre-scales, of which one can be folded: attention is linear in its values."""
    artifact = artifact_by_hand("dit", 8, 8)
    generator = torch.Generator().manual_seed(0)
    sites, params = dict(artifact.sites), dict(artifact.params)
    for name in (TO_OUT, UP):
        params[f"{name}.pre_scale"] = 0.25 + torch.rand(sites[name].codes.shape[1], generator=generator)
    site = sites.pop(f"{BLOCK}.ff.net.0.proj")
    for index, codes in enumerate(site.codes.split([6, 10], dim=1)):
        sites[f"{BLOCK}.ff.net.0.proj.segment{index}"] = replace(site, codes=codes.contiguous())
    params[f"{BLOCK}.ff.net.0.proj.segment0.bias"] = params.pop(f"{BLOCK}.ff.net.0.proj.bias")
    structure = NetworkRewrite(
        segments={f"{BLOCK}.ff.net.0.proj": (6, 10)}, pre_scaled=(TO_OUT, UP), rotated={TO_Q: BLOCK_SIZE, UP: BLOCK_SIZE}
    )
    artifact = replace(artifact, sites=sites, params=params, structure=structure)
    artifact.validate()
    return artifact


@pytest.fixture(scope="module")
def before():
    return restructured()


@pytest.fixture(scope="module")
def after(before):
    folded = fold_pre_scales(before)
    assert folded.structure.pre_scaled == (UP,)  # the other was moved into the projection of the values
    return folded


def updates(artifact, layers):
    """A LoRA's weights by graph input, of an artifact with a branch at every layer."""
    target = LoraTarget(artifact.family_object, artifact.config, 8)
    lora = read_lora(peft_tensors({name: shape for name, shape in target.shapes().items() if name in layers}, rank=3), target)
    adapters = adapters_of(artifact, rank=3, pattern=".")
    sites = BranchTarget(adapters, artifact.structure, site_factors(artifact, adapters)).site_weights(lora)
    values = adapters.zeros(torch.float32, torch.device("cpu"))
    for site, update in sites.items():
        values |= {down_input(site): update.down, up_input(site): update.up}
    return lora, values


@pytest.mark.parametrize("folds", [False, True], ids=["Mul", "folded"])
@pytest.mark.parametrize(
    "layer", [TO_OUT, UP, TO_V, TO_Q, f"{BLOCK}.ff.net.0.proj"], ids=["pre-scaled", "kept and rotated", "absorbing", "rotated", "split"]
)
def test_a_branch_adds_the_published_layers_update_whatever_its_site_reads_and_writes(before, after, layer, folds):
    """Judged on the layer's own float inputs and outputs, in the network that is quantized without a LoRA."""
    artifact = after if folds else before
    lora, values = updates(artifact, {layer})
    inputs = tiny_inputs("dit")
    plain, adapted = Reference(artifact), Reference(artifact, values)
    parts = [site for site in artifact.sites if site == layer or site.startswith(f"{layer}.segment")]
    scales = inputs | {SLOT_SCALES: torch.ones(3, 3)}
    without = plain.record(inputs)
    with_it = adapted.at_sites({site: without[site].x for site in parts}, inputs["timestep"], scales[SLOT_SCALES])
    added = sum((with_it[site].y - without[site].y) for site in parts)
    factors = site_factors(artifact, adapters_of(artifact, rank=1, pattern="."))
    inputs_of = [
        rotate(without[site].x, BLOCK_SIZE) * gain(BLOCK_SIZE) if site in artifact.structure.rotated else without[site].x for site in parts
    ]
    x = torch.cat(
        [x / factors.get(f"{site}.input", torch.ones(1)) for site, x in zip(parts, inputs_of, strict=True)], dim=-1
    )  # of the published layer
    expected = functional.linear(x, lora.layers[layer].delta()) * factors.get(f"{parts[0]}.output", torch.ones(1))
    torch.testing.assert_close(added, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_folding_keeps_the_network_with_a_lora(before, after):
    """The same LoRA on the artifact with and without folded pre-scales: the factors of the fold are those that the weights were changed by."""
    inputs = tiny_inputs("dit") | {SLOT_SCALES: torch.ones(3, 3)}
    found = []
    for artifact in (before, after):
        _, values = updates(artifact, {TO_Q, TO_V, TO_OUT, UP})
        found.append(Reference(artifact, values)(inputs))
    plain = Reference(before)(inputs)
    # Exact but for float32: no code of these three samples is so near a tie that the order of two products moves it.
    assert (found[0] - found[1]).norm() < 0.05 * (found[0] - plain).norm()


def test_the_factors_are_saved_with_the_artifact_and_part_of_its_digest(after, tmp_path):
    loaded = Artifact.load(after.save(tmp_path / "a"))
    assert {name: value.tolist() for name, value in loaded.absorbed.items()} == {
        name: value.tolist() for name, value in after.absorbed.items()
    }
    assert set(loaded.absorbed) == {f"{TO_OUT}.input", f"{TO_V}.output"}
    assert replace(after, absorbed={}).digest != after.digest == loaded.digest
    with pytest.raises(ArtifactError, match=r"absorbed 'conv\.input' \[3\] fits no site"):
        replace(after, absorbed={"conv.input": torch.ones(3)}).validate()
    with pytest.raises(ArtifactError, match="holds a value that is not positive"):
        replace(after, absorbed={f"{TO_OUT}.input": torch.zeros(16)}).validate()


def test_an_artifact_that_lost_its_factors_is_refused(before):
    turned = replace(before, provenance={"rotations": "9 of 12, 4 of them folded"})
    with pytest.raises(UnsupportedError, match=r"4 rotations of this artifact were folded .* --set rotate=off"):
        adapters_of(turned, rank=4)
    adapters_of(replace(before, provenance={"rotations": "9 of 12, 0 of them folded"}), rank=4)
    lost = replace(before, provenance={"folded_pre_scales": "3 of 5"})
    with pytest.raises(
        UnsupportedError, match=r"3 pre-scales of this artifact were folded .* Make the artifact again, or use it without LoRA"
    ):
        adapters_of(lost, rank=4)


def test_a_rank_above_the_engines_and_layers_without_branch_are_refused(before):
    target = LoraTarget(before.family_object, before.config, 8)
    lora = read_lora(peft_tensors(target.shapes(), rank=5), target)
    adapters = adapters_of(before, rank=4)
    with pytest.raises(InputError, match=r"The LoRA has rank 5; this engine has 4 rank slots\. Export it again with --lora-rank 5"):
        BranchTarget(adapters, before.structure).site_weights(lora)
    with pytest.raises(InputError, match=r"changes layer 'pos_embed\.proj' and \d+ more, which has no adapter branch.*--lora-layers"):
        BranchTarget(adapters_of(before, rank=5), before.structure).site_weights(lora)


def test_factors_that_fit_no_branch_are_refused():
    adapters = AdapterInputs(2, {"a": (3, 4)})
    check_factors({"a.input": torch.ones(4), "a.output": torch.ones(3)}, adapters)
    for name, value in (("b.input", torch.ones(4)), ("a.other", torch.ones(4))):
        with pytest.raises(ArtifactError, match="belongs to no adapter branch"):
            check_factors({name: value}, adapters)
    for value in (torch.ones(3), torch.zeros(4), torch.ones(4).double()):
        with pytest.raises(ArtifactError, match=r"'a\.input' is .* expected float32 \[4\] without zeros"):
            check_factors({"a.input": value}, adapters)

import pytest
import torch
from torch import nn

from calibration import RunOptions, fit
from calibration.recipes.mpq_dm import MPQDM, init_lora_from_error, last_block, smoothing_scales
from calibration.student.layers import StudentLayer
from calibration.student.quantization_spec import LayerSpec
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_context, tiny_source


def test_smoothing_divides_the_range_equally_between_inputs_and_weights():
    weight = torch.tensor([[[1.0], [-2.0], [0.0]]])
    # sqrt(16 / 1) = 4 and sqrt(2 / 2) = 1, in units of their geometric mean 2; the third channel has no weights.
    assert smoothing_scales(torch.tensor([16.0, 2.0, 3.0]), weight, 0.5).tolist() == pytest.approx([2.0, 0.5, 1.0])


def test_no_power_is_no_smoothing():
    assert smoothing_scales(torch.tensor([16.0, 2.0]), torch.ones(1, 2, 1), 0.0).tolist() == [1.0, 1.0]


def test_an_update_along_the_error_is_zero_initially_and_spans_its_leading_rows():
    torch.manual_seed(0)
    layer = StudentLayer(nn.Linear(6, 8), LayerSpec(4, None, True), None)
    layer.set_weight_scale(torch.full((8,), 0.1))
    layer.add_update(2, torch.Generator().manual_seed(0))
    before, size = layer.merged_weight().clone(), layer.lora_a.norm()
    init_lora_from_error(layer)
    assert torch.equal(layer.merged_weight(), before)
    assert torch.allclose(layer.lora_a.norm(), size)
    error = (layer.layer.weight - layer.rounded_weight()).detach()
    a = layer.lora_a.detach()
    kept = (error @ torch.linalg.pinv(a) @ a).square().sum()  # the part of the error in the span of A's rows
    assert torch.allclose(kept, torch.linalg.svdvals(error)[:2].square().sum(), rtol=1e-4)


def test_the_last_block_of_a_unet_ends_its_decoder():
    assert last_block(tiny_context(MPQDM()).student) == "up_blocks.1.resnets.1"


def test_an_unknown_initialization_of_the_update_is_refused():
    with pytest.raises(InputError, match=r"update_init is 'svd'; expected one of zero, error"):
        MPQDM(update_init="svd")


def test_bits_differ_by_channel_and_their_mean_is_kept():
    settings = {"rows": 3, "steps": 1, "batch": 2, "calibration_samples": 2, "rank": 2, "mixed_share": 0.25, "update_init": "error"}
    artifact = fit(tiny_source(), MPQDM(**settings), RunOptions())
    mixed = [site for site in artifact.sites.values() if site.channel_bits is not None]
    assert len(mixed) == artifact.provenance["mixed_layers"] > 0
    assert {float(site.channel_bits.float().mean()) for site in mixed} == {4.0}
    assert {int(bits) for site in mixed for bits in site.channel_bits} == {3, 4, 5}

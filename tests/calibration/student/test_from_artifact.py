import functools
from dataclasses import replace

import pytest
import torch

from calibration import RunOptions, fit
from calibration.passes.pcr import Pcr
from calibration.recipes.mpq_dm import MPQDM
from calibration.recipes.mse import Mse
from calibration.recipes.qdiff import QDiff
from calibration.recipes.svdquant import SvdQuant
from calibration.student.from_artifact import spec_of, structure_of, student_from_artifact, with_params
from calibration.student.teacher import restructured
from calibration.student.to_artifact import artifact_from_student
from edm_deploy.artifact.reference import reference_with_correction
from edm_deploy.errors import InputError
from tests.calibration.tiny import CPU, tiny_source
from tests.conftest import artifact_by_hand, tiny_inputs

RECIPES = {
    # Pre-scales (some folded into norms), bits by channel, merged updates, corrected biases; the updates are large, so that many codes move.
    "mpq-dm": MPQDM(rows=3, calibration_samples=3, steps=2, batch=3, rank=2, mixed_share=0.25, update_rate=0.5, bias_correction=True),
    # Segments and AdaRound.
    "qdiff": QDiff(rows=3, calibration_samples=2, steps=4, batch=2, rounding_rate=0.1, act_bits=4),
    # Float branches, and GPTQ; at the noisiest timesteps inputs have 8 bits.
    "svdquant": SvdQuant(rows=3, calibration_samples=2, rank=2),
    # Rotated inputs of a transformer, some of them folded.
    "mse": Mse(weight_bits=4, act_bits=4, rows=3, calibration_samples=2, rotate="all"),
}
KINDS = {"mse": "pixart"}
PASSES = {"svdquant": [Pcr(relax_from=0.0, relax_to=0.5)]}


@functools.cache
def made(name):
    return fit(tiny_source(KINDS.get(name, "unet2d")), RECIPES[name], RunOptions(), passes=PASSES.get(name, ()))


def started(artifact, kind="unet2d"):
    source = with_params(restructured(tiny_source(kind), structure_of(artifact)), artifact)
    return student_from_artifact(artifact, source, CPU), source


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.extended] if name == "svdquant" else []) for name in RECIPES])
def test_the_first_forward_pass_is_that_of_the_artifact(name):
    artifact, kind = made(name), KINDS.get(name, "unet2d")
    inputs = tiny_inputs(kind, batch=3) | {"timestep": artifact.timesteps.float()}  # a student relaxes whole rows, a runtime timesteps
    student, source = started(artifact, kind)
    again = artifact_from_student(student, source, {})
    assert again.structure == artifact.structure
    assert (again.relaxed is None) == (artifact.relaxed is None) == (name != "svdquant")
    assert torch.equal(again.row_of_timestep, artifact.row_of_timestep)
    for site, expected in artifact.sites.items():
        found = again.sites[site]
        assert torch.equal(found.codes, expected.codes), site
        assert (found.channel_bits is None) == (expected.channel_bits is None)
        assert (found.relaxed_activation is None) == (expected.relaxed_activation is None)
        assert torch.equal(found.activation.qmin, expected.activation.qmin)
        assert torch.equal(found.activation.qmax, expected.activation.qmax)
        torch.testing.assert_close(found.weight_scale, expected.weight_scale, rtol=1e-6, atol=0)  # stored as logarithms
        torch.testing.assert_close(found.activation.scale, expected.activation.scale, rtol=1e-6, atol=0)
    assert again.params.keys() == artifact.params.keys()
    assert all(torch.equal(value, artifact.params[key]) for key, value in again.params.items())
    family, model = source.family_object, tiny_source(kind).model
    expected, exact = (
        family.prediction(source.config, found) for found in (reference_with_correction(artifact)(inputs), family.forward(model, inputs))
    )
    with torch.no_grad():
        found = student(inputs)
    shares = [float((one - other).norm() / (other - right).norm()) for one, other, right in zip(found, expected, exact, strict=True)]
    assert (
        sorted(shares)[1] < 0.01
    )  # of three samples two: a rounding tie, decided by the last bit of a scale, changes all that follows in its sample


def test_the_float_weight_behind_a_code_is_the_source_s_unless_the_code_is_another():
    artifact = made("qdiff")
    student, source = started(artifact)
    kept = decided = 0
    for name, layer in student.layers.items():
        weight, published = layer.layer.weight, source.model.get_submodule(name).weight
        same = weight == published
        kept, decided = kept + int(same.sum()), decided + int((~same).sum())
        dequantized = artifact.sites[name].codes * artifact.sites[name].weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
        torch.testing.assert_close(weight[~same], dequantized[~same], rtol=1e-5, atol=1e-8)
    assert kept > decided > 0


def test_the_source_is_not_changed():
    source, before = tiny_source(), tiny_source().model.state_dict()
    found = with_params(restructured(source, structure_of(made("mpq-dm"))), made("mpq-dm"))
    assert all(torch.equal(value, before[key]) for key, value in source.model.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in found.model.state_dict().items() if key in before)


def test_bounds_tell_a_symmetric_range_from_an_asymmetric_one():
    site = artifact_by_hand(rows=2).sites["mid_block.attentions.0.to_q"]

    def of(qmin, qmax):
        table = replace(site.activation, qmin=torch.tensor([qmin] * 2, dtype=torch.int8), qmax=torch.tensor([qmax] * 2, dtype=torch.int8))
        return spec_of("a", replace(site, activation=table))

    assert of(-7, 7).symmetric
    assert not of(-3, 12).symmetric
    with pytest.raises(InputError, match=r"Site 'a' has bounds from -3 to 5, which are no full range of 4 bits"):
        of(-3, 5)
    assert spec_of("a", replace(site, activation=None)).act_bits is None


def test_an_artifact_with_a_layer_in_floating_point_is_refused():
    artifact = made("qdiff")
    name = "mid_block.attentions.0.to_q"
    sites = {key: site for key, site in artifact.sites.items() if key != name}
    with pytest.raises(InputError, match=r"keeps 'mid_block\.attentions\.0\.to_q' in floating point"):
        student_from_artifact(replace(artifact, sites=sites), tiny_source(), CPU)

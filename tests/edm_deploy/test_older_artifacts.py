"""One artifact of each schema, as the version of its day wrote it: a DiT of one block, 4 channels wide. They are not made again."""

import json
from pathlib import Path

import pytest
import torch

from edm_deploy.artifact.artifact import JSON_NAME, SCHEMA, TENSORS_NAME, Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.artifact.timestep_correction import Correction

ARTIFACTS = Path(__file__).parent / "artifacts"
# What the version that wrote each computed, at one corner of two samples.
PREDICTIONS = {
    1: [-0.16680, -0.11272, -0.04631, -0.01673],
    2: [-0.16691, -0.11253, -0.04638, -0.01711],
    3: [-0.16456, -0.11669, -0.04983, -0.01816],
    4: [-0.62288, 0.34390, -0.16136, 0.30797],
}


def written(schema):
    return json.loads((ARTIFACTS / f"schema{schema}" / JSON_NAME).read_text())


def test_there_is_one_of_each_schema():
    assert [written(schema)["schema"] for schema in PREDICTIONS] == list(range(1, SCHEMA + 1))


@pytest.mark.parametrize("schema", PREDICTIONS)
def test_it_loads_with_its_digest_and_computes_what_it_did(schema):
    artifact = Artifact.load(ARTIFACTS / f"schema{schema}")
    assert artifact.digest == written(schema)["digest"]
    inputs = {
        "sample": torch.linspace(-1, 1, 64).reshape(2, 2, 4, 4),
        "timestep": torch.tensor([0.0, 700.0]),
        "class_labels": torch.tensor([0, 3]),
    }
    found = Reference(artifact)(inputs)[:, 0, 0, :2].flatten()
    # Half of the last digit that stands above, and what norms in float32 differ by between versions of torch. One code that flipped would show.
    torch.testing.assert_close(found, torch.tensor(PREDICTIONS[schema]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("schema", PREDICTIONS)
def test_saved_again_it_is_of_this_schema_and_the_same(schema, tmp_path):
    path = Artifact.load(ARTIFACTS / f"schema{schema}").save(tmp_path / "a")
    again = json.loads((path / JSON_NAME).read_text())
    assert again["schema"] == SCHEMA
    assert again["digest"] == written(schema)["digest"]
    assert (path / TENSORS_NAME).read_bytes() == (ARTIFACTS / f"schema{schema}" / TENSORS_NAME).read_bytes()


def test_each_field_is_there_from_its_schema_on():
    first, second, third, fourth = (Artifact.load(ARTIFACTS / f"schema{schema}") for schema in PREDICTIONS)
    assert (first.folded, second.folded) == ((), ("transformer_blocks.0.norm1.linear",))
    assert not first.structure and not second.structure
    assert third.structure.segments == {"transformer_blocks.0.ff.net.2": (6, 10)}
    assert third.structure.pre_scaled == ("transformer_blocks.0.attn1.to_out.0",)
    assert third.sites["transformer_blocks.0.attn1.to_q"].channel_bits.tolist() == [5, 4, 4, 4]
    assert (first.correction, second.relaxed) == (None, None)
    assert isinstance(third.correction, Correction) and int(third.relaxed.sum()) == 10
    assert fourth.structure.branches["transformer_blocks.0.ff.net.2"] == 1
    assert fourth.structure.rotated["transformer_blocks.0.attn1.to_q.base"] == 2
    query = fourth.sites["transformer_blocks.0.attn1.to_q.base"]
    assert (query.activation.bits, query.relaxed_activation.bits) == (4, 8)
    assert third.sites["transformer_blocks.0.ff.net.0.proj"].relaxed_activation is None
    assert sorted(fourth.absorbed) == ["transformer_blocks.0.attn1.to_out.0.base.input", "transformer_blocks.0.attn1.to_v.base.output"]

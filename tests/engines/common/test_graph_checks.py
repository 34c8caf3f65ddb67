from dataclasses import replace

import pytest
import torch

from edm_deploy.errors import ArtifactError
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from engines.common.graph_checks import check_graph, check_rows, check_tensors


@pytest.fixture
def manifest(artifact_w4a4):
    stated = Manifest.of(artifact_w4a4, dict.fromkeys(artifact_w4a4.sites, ""), kind="engine", dtype="fp32", weight_storage="int8")
    fixed = ShapeRange(8, 8, 8)
    return replace(stated, profile={"batch": ShapeRange(1, 2, 3), "height": fixed, "width": fixed})


def test_a_dynamic_dimension_may_be_fixed_where_the_profile_has_one_size(manifest):
    for size in (None, 8):
        check_graph(manifest, {"sample": [None, 3, size, size], "timestep": [None]}, ["prediction"])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            {"sample": [None, 3, 8, 8]},
            ["prediction"],
            "The graph takes sample and returns prediction; manifest.json states sample, timestep",
        ),
        ({"sample": [None, 3, 8, 8], "timestep": [None]}, ["y"], "returns y; manifest.json states"),
        (
            {"sample": [None, 4, 8, 8], "timestep": [None]},
            ["prediction"],
            r"input sample has shape \['\?', 4, 8, 8\], manifest.json states",
        ),
        ({"sample": [None, 3, 16, 8], "timestep": [None]}, ["prediction"], "input sample has shape"),
        ({"sample": [1, 3, 8, 8], "timestep": [None]}, ["prediction"], "input sample has shape"),
        ({"sample": [None, 3, 8], "timestep": [None]}, ["prediction"], "input sample has shape"),
    ],
)
def test_a_graph_of_other_inputs_or_outputs_is_refused(manifest, inputs, outputs, message):
    with pytest.raises(ArtifactError, match=message):
        check_graph(manifest, inputs, outputs)


def test_tensors_have_their_dtype_and_shape():
    expected = {"a": (torch.int8, (2,))}
    check_tensors({"a": torch.zeros(2, dtype=torch.int8)}, expected, of="Site 'x'")
    for tensors, message in (
        ({}, "Site 'x': the engine holds no a"),
        ({"a": torch.zeros(2)}, r"a is torch.float32 \[2\], expected torch.int8 \[2\]"),
        ({"a": torch.zeros(3, dtype=torch.int8)}, r"a is torch.int8 \[3\], expected"),
    ):
        with pytest.raises(ArtifactError, match=message):
            check_tensors(tensors, expected, of="Site 'x'")


def test_rows_are_within_the_tables():
    check_rows(torch.tensor([0, 1], dtype=torch.int32), 2, 2)
    for rows in (torch.tensor([0, 2]), torch.tensor([-1, 0])):
        with pytest.raises(ArtifactError, match="points outside the 2 table rows"):
            check_rows(rows.int(), 2, 2)
    with pytest.raises(ArtifactError, match=r"expected torch\.int32"):
        check_rows(torch.tensor([0, 1]), 2, 2)

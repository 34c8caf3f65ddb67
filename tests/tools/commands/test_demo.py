from __future__ import annotations

import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy_tools.commands.demo import labelled_rows, made_by, made_from, scheme_bits
from edm_deploy_tools.common.recipe_settings import recipe_with


def test_a_scheme_is_read_in_either_case():
    assert scheme_bits("W4A8") == (4, 8)
    assert scheme_bits("w8a8") == (8, 8)
    with pytest.raises(InputError, match="W4A4"):
        scheme_bits("4x4")


def test_an_artifact_of_other_settings_is_not_kept(chain):
    artifact = Artifact.load(chain.artifact)
    same = recipe_with("minmax", flags={"rows": 4}, overrides=["calibration_samples=2"])
    assert made_by(artifact, same)
    assert not made_by(artifact, recipe_with("minmax", flags={"rows": 5}, overrides=["calibration_samples=2"]))
    assert not made_by(artifact, recipe_with("mse", flags={"rows": 4}, overrides=["calibration_samples=2"]))


def test_an_engine_of_another_artifact_is_not_kept(chain, tmp_path):
    artifact = Artifact.load(chain.artifact)
    assert made_from(chain.engine, artifact, "engine")
    assert made_from(chain.onnx, artifact, "onnx")
    assert made_from(chain.onnx, artifact, "engine") is None
    assert made_from(tmp_path, artifact, "engine") is None


def test_the_grid_has_a_row_for_each_label():
    rows = {"float": torch.zeros(2, 3, 32, 32), "fine-tuned": torch.ones(2, 3, 32, 32)}
    image = labelled_rows(rows)
    assert image.height == 2 * (96 + 10) + 10
    assert image.getpixel((image.width - 20, 150)) == (255, 255, 255)

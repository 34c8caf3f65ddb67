"""The family of docs/add-a-family.md, run as it is printed there."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import calibration
from calibration.recipes.minmax import RECIPE
from calibration.run.options import RunOptions
from edm_deploy import load_denoiser, models
from edm_deploy.artifact.reference import Reference
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.models import family_named, name_of_family
from edm_deploy.pipelines.schedulers import scheduler_from_config
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import ShapeRange
from engines import build_engine
from tests.conftest import FLOW_SCHEDULER, check_no_further

TEXT = (Path(__file__).parents[1] / "docs" / "add-a-family.md").read_text()
TINY_AURAFLOW = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 64,
}


def worked_example() -> tuple[str, str]:
    """The module's name and source."""
    (source,) = re.findall(r"```python\n(# edm_deploy/models/.*?)```", TEXT, flags=re.DOTALL)
    return Path(source.splitlines()[0].removeprefix("# ")).stem, source


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The example, found like any other family: its file is in a folder that the registry searches."""
    name, source = worked_example()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{name}.py").write_text(source)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "models")])
    yield family_named(name_of_family("AuraFlowTransformer2DModel"))
    sys.modules.pop(f"edm_deploy.models.{name}", None)


def test_the_example_is_short():
    assert len(worked_example()[1].splitlines()) < 60


def test_the_example_goes_from_a_float_model_to_an_engine(family, tmp_path):
    torch.manual_seed(0)
    model = family.build(TINY_AURAFLOW).eval().requires_grad_(False)
    config = json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
    scheduler = scheduler_from_config(FLOW_SCHEDULER["_class_name"], FLOW_SCHEDULER)
    name = name_of_family(family.class_name)
    source = Source(name="tiny", family=name, config=config, model=model, scheduler=scheduler, pipeline={})
    artifact = calibration.fit(source, RECIPE(rows=3, calibration_samples=2), RunOptions())
    onnx_from_artifact(artifact, tmp_path / "onnx")
    sizes = {"batch": ShapeRange(1, 2, 2), "height": ShapeRange(8, 8, 16), "width": ShapeRange(8, 8, 16), "tokens": ShapeRange(1, 9, 256)}
    build_engine(tmp_path / "onnx", tmp_path / "engine", backend="ort", options=BuildOptions(profile=sizes))
    engine, reference = load_denoiser(tmp_path / "engine"), Reference(artifact)
    generator = torch.Generator().manual_seed(0)
    for height, width in ((8, 8), (10, 16)):
        sample = torch.randn(2, 4, height, width, generator=generator)
        tokens = torch.randn(2, 9, 12, generator=generator)
        timestep = torch.tensor([1000.0, 20.0])
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": tokens}
        expected = reference(inputs)
        # As its pipeline calls it.
        found = engine(hidden_states=sample, encoder_hidden_states=tokens, timestep=timestep / 1000, return_dict=False)[0]
        exact = family.forward(model, inputs)
        check_no_further(found, expected, exact)
        assert float((expected - exact).abs().max()) < 0.1 * float(exact.abs().max())  # W8A8 errs by about 2 % of the largest output

from __future__ import annotations

import json

import pytest

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.pipelines.model_index import read_pipeline_config
from edm_deploy.pipelines.source import load_source


def test_a_pipeline_config_is_that_of_the_loaded_source_without_its_weights(save_tiny_pipeline, tmp_path):
    source = load_source(save_tiny_pipeline(tmp_path / "p"))
    (tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    described = read_pipeline_config(tmp_path / "p")
    assert (described.family, described.config, described.pipeline) == (source.family, source.config, source.pipeline)
    assert described.component == "unet"
    assert described.scheduler_class == type(source.scheduler).__name__
    assert described.scheduler_config["num_train_timesteps"] == source.num_train_timesteps


def test_a_config_that_the_family_does_not_support_is_refused_before_any_weight_is_read(save_tiny_pipeline, tmp_path):
    path = save_tiny_pipeline(tmp_path / "p") / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_embedding_type": "fourier"}))
    with pytest.raises(UnsupportedError, match="indexed by noise level"):
        read_pipeline_config(tmp_path / "p")


def test_a_pipeline_without_its_config_is_one_clear_error(save_tiny_pipeline, tmp_path):
    (save_tiny_pipeline(tmp_path / "p") / "unet" / "config.json").unlink()
    with pytest.raises(ArtifactError, match="config"):
        read_pipeline_config(tmp_path / "p")

import json

import pytest
import torch

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.pipelines.source import load_source, local_directory


def test_a_source_is_the_float_model_with_its_scheduler(save_tiny_pipeline, tmp_path):
    source = load_source(save_tiny_pipeline(tmp_path / "p"))
    assert source.family == "unet2d"
    assert source.num_train_timesteps == 1000
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert source.digest() == load_source(tmp_path / "p").digest()


def test_the_digest_of_a_source_depends_on_every_weight(save_tiny_pipeline, tmp_path):
    source = load_source(save_tiny_pipeline(tmp_path / "p"))
    before = source.digest()
    source.model.conv_in.bias[0] += 1
    assert source.digest() != before


def spoil_pickle(path):
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, path / "unet" / "diffusion_pytorch_model.bin")


def spoil_index(path, **changes):
    index = json.loads((path / "model_index.json").read_text())
    index |= changes
    (path / "model_index.json").write_text(json.dumps({key: value for key, value in index.items() if value is not None}))


FAULTS = {
    "no index": (
        lambda p: (p / "model_index.json").unlink(),
        ArtifactError,
        r"no diffusers pipeline directory: it has no model_index\.json",
    ),
    "pickle": (spoil_pickle, ArtifactError, "is a pickle checkpoint, which can run code"),
    "no weights": (lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").unlink(), ArtifactError, "holds no safetensors weights"),
    "no scheduler": (lambda p: spoil_index(p, scheduler=None), ArtifactError, "without a scheduler"),
    "no denoiser": (lambda p: spoil_index(p, unet=None), UnsupportedError, "without a unet or transformer"),
    "unknown class": (
        lambda p: spoil_index(p, unet=["diffusers", "UNet3DModel"]),
        UnsupportedError,
        "No model family supports 'UNet3DModel'. Did you mean 'UNet2DModel'",
    ),
    "damaged weights": (
        lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights"),
        ArtifactError,
        "cannot be read as UNet2DModel",
    ),
    "no scheduler config": (lambda p: (p / "scheduler" / "scheduler_config.json").unlink(), ArtifactError, "scheduler_config"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_a_model_that_cannot_be_used_is_one_clear_error(save_tiny_pipeline, tmp_path, fault):
    spoil, error, message = FAULTS[fault]
    spoil(save_tiny_pipeline(tmp_path / "p"))
    with pytest.raises(error, match=message):
        load_source(tmp_path / "p")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/dir", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(path):
    with pytest.raises(ArtifactError, match=r"does not exist; expected a diffusers directory or a hub id"):
        load_source(path)


def test_without_weights_only_json_is_downloaded_from_the_hub(monkeypatch, tmp_path):
    request = {}
    monkeypatch.setattr(
        "edm_deploy.pipelines.source.snapshot_download", lambda name, **options: request.update(name=name, **options) or str(tmp_path)
    )
    assert local_directory("some/model", weights=False) == tmp_path
    assert request["name"] == "some/model"
    assert all(pattern.endswith(".json") for pattern in request["allow_patterns"])

import pytest

from edm_deploy.storage.variants import variant_in, variant_of

STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        ([f"{STEM}.safetensors"], None),
        ([f"{STEM}.fp16.safetensors"], "fp16"),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"], None),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"], None),
        ([f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"], "fp16"),
        ([f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}-00002-of-00002.fp16.safetensors"], "fp16"),
        ([f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"], None),
        (["model.fp16.safetensors"], "fp16"),
        (["config.json"], None),
    ],
)
def test_a_variant_is_that_of_all_files(tmp_path, files, variant):
    (tmp_path / "unet").mkdir()
    for name in files:
        (tmp_path / "unet" / name).touch()
    assert variant_of(tmp_path / "unet") == variant_in(tmp_path) == variant

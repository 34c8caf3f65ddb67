import pytest

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.network.family import TIMESTEP, ModelInput
from edm_deploy.runtime.manifest_checks import check_build, check_family, check_files, check_tensors
from edm_deploy.storage.directories import sha256_of
from tests.conftest import TINY, tiny_model


@pytest.mark.parametrize("kind", TINY)
def test_the_latent_channels_of_each_family_are_those_of_its_samples(kind):
    family, config, _ = tiny_model(kind)
    shape = family.latent_shape(config)
    assert check_family(TINY[kind][0], config) == (shape[0] if len(shape) == 3 else shape[-1])


@pytest.mark.parametrize("value", [None, "x", [], {}, [[1]]], ids=repr)
def test_a_value_that_the_family_cannot_compute_with_is_named(value):
    _, config, _ = tiny_model("unet2d")
    with pytest.raises(ArtifactError, match=r"config\.\w+ has a value that UNet2DModel cannot have"):
        check_family("unet2d", config | {"in_channels": value})


BUILD = {"versions": {"openvino": "2026.1"}, "options": {"precision": "fp32", "threads": None}, "details of a backend": [1]}


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("openvino", {"threads": 10**12}, r"build\.options\.threads is 1000000000000, expected an integer <= 1024"),
        ("openvino", {"threads": True}, r"build\.options\.threads is true, expected an integer or null"),
        ("openvino", {"precision": "fp16"}, r"build\.options\.precision is 'fp16', expected fp32 or bf16"),
        ("openvino", {"precision": None}, r"build\.options\.precision is None, expected fp32 or bf16"),
        ("cpu", {"precision": "fp32"}, r"build\.options\.precision is 'fp32', expected bf16 or fp16"),
        ("cuda", {"precision": "fp16"}, r"build\.options has no field 'gpu', which cuda reads"),
        ("cuda", {"precision": "fp16", "gpu": None}, r"build\.options\.gpu is null, expected a compute capability"),
        ("cuda", {"precision": "fp16", "gpu": "sm_"}, r'build\.options\.gpu is "sm_", expected a string matching regex'),
    ],
    ids=str,
)
def test_what_a_backend_reads_of_the_build_is_checked(backend, options, message):
    check_build(BUILD, "openvino")
    with pytest.raises(ArtifactError, match=message):
        check_build(BUILD | {"options": BUILD["options"] | options}, backend)


def test_a_missing_option_and_an_unknown_backend_are_refused():
    with pytest.raises(ArtifactError, match=r"build\.options has no field 'threads', which ort reads"):
        check_build(BUILD | {"options": {}}, "ort")
    with pytest.raises(UnsupportedError, match="No backend 'opnvino'"):
        check_build(BUILD, "opnvino")


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((TIMESTEP, TIMESTEP), ("y",), "name one tensor twice"),
        ((TIMESTEP,), ("y", "y"), "name one tensor twice"),
        ((ModelInput("x", "float", ("height", 3)),), ("y",), "expected 'batch' first"),
        ((ModelInput("x", "float", ("batch", -3)),), ("y",), "expected sizes of 1 to"),
        ((ModelInput("x", "float", ()),), ("y",), "expected 'batch' first"),
    ],
)
def test_inputs_begin_with_the_batch_and_are_named_once(inputs, outputs, message):
    with pytest.raises(ArtifactError, match=message):
        check_tensors(inputs, outputs)


def test_a_listed_file_is_a_regular_file_with_its_hash(tmp_path):
    (tmp_path / "a").write_text("1")
    check_files(tmp_path, {"a": sha256_of(tmp_path / "a")}, listed_in="m.json")
    with pytest.raises(ArtifactError, match="does not match"):
        check_files(tmp_path, {"a": "0" * 64}, listed_in="m.json")
    with pytest.raises(ArtifactError, match="is not a regular file"):
        check_files(tmp_path.parent, {tmp_path.name: "0" * 64}, listed_in="m.json")

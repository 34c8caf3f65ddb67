import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from edm_deploy.artifact.artifact import JSON_NAME, SCHEMA, TENSORS_NAME, Artifact
from edm_deploy.errors import ArtifactError
from tests.conftest import artifact_by_hand
from tests.mutations import write_description


def rewrite(path, tensors=None, **changes):
    """Change an artifact on disk and compute its hashes again, as a hostile or careless writer would."""
    description = json.loads((path / JSON_NAME).read_text())
    if tensors is not None:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path / TENSORS_NAME)
    write_description(path, description | changes)


@pytest.fixture
def saved(artifact_w4a4, tmp_path):
    return artifact_w4a4.save(tmp_path / "artifact")


@pytest.mark.parametrize("kind", ["unet2d", "unet2d-classes", "unet2d-condition"])
@pytest.mark.parametrize("bits", [(4, 4), (3, 6), (8, 8), (4, 16)], ids=str)
def test_load_undoes_save(kind, bits, tmp_path):
    artifact = artifact_by_hand(kind, *bits)
    loaded = Artifact.load(artifact.save(tmp_path / "a"))
    assert loaded.digest == artifact.digest
    assert loaded.config == artifact.config
    for name, site in artifact.sites.items():
        assert torch.equal(loaded.sites[name].codes, site.codes)
        assert loaded.sites[name].scheme == site.scheme
    assert all(torch.equal(loaded.params[name], value) for name, value in artifact.params.items())
    assert loaded.pipeline == artifact.pipeline


def test_the_digest_ignores_provenance_and_sees_a_single_code(artifact_w4a4):
    assert replace(artifact_w4a4, provenance={"seconds": 5}).digest == artifact_w4a4.digest
    name, site = next(iter(artifact_w4a4.sites.items()))
    codes = site.codes.clone()
    codes.view(-1)[0] = -codes.view(-1)[0] - 1
    assert replace(artifact_w4a4, sites={**artifact_w4a4.sites, name: replace(site, codes=codes)}).digest != artifact_w4a4.digest


def test_four_bit_codes_take_half_a_byte_each(saved, artifact_w4a4):
    stored = load_file(saved / TENSORS_NAME)
    name = "down_blocks.0.resnets.0.conv1"
    assert stored[f"sites.{name}.codes"].dtype == torch.uint8
    assert stored[f"sites.{name}.codes"].numel() * 2 == artifact_w4a4.sites[name].codes.numel()


def test_the_scheme_is_that_of_most_sites(artifact_w4a4):
    assert artifact_w4a4.scheme == "W4A4"


def test_saving_again_replaces_the_old_artifact_whole(saved, artifact_w8a8):
    artifact_w8a8.save(saved)
    assert Artifact.load(saved).scheme == "W8A8"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["artifact"]


def test_a_missing_path_is_reported(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        Artifact.load(tmp_path / "nowhere")


def test_a_directory_that_is_no_artifact_is_reported(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(ArtifactError, match=r"no artifact directory: it has no artifact\.json"):
        Artifact.load(tmp_path / "x")


def test_a_flipped_byte_is_found(saved):
    data = bytearray((saved / TENSORS_NAME).read_bytes())
    data[-1] ^= 1
    (saved / TENSORS_NAME).write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged: its sha256 is"):
        Artifact.load(saved)


def test_malformed_json_is_reported(saved):
    (saved / JSON_NAME).write_text('{"schema": 1,')
    with pytest.raises(ArtifactError, match="cannot be read as json"):
        Artifact.load(saved)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_json_other_than_an_object_is_reported(saved, content):
    (saved / JSON_NAME).write_text(content)
    with pytest.raises(ArtifactError, match="expected a json object"):
        Artifact.load(saved)


def test_a_newer_schema_asks_for_a_newer_version(saved):
    rewrite(saved, schema=SCHEMA + 1)
    with pytest.raises(ArtifactError, match=rf"schema {SCHEMA + 1}; this edm-deploy reads up to {SCHEMA}. Install a newer"):
        Artifact.load(saved)


def test_a_missing_tensors_file_is_reported(saved):
    (saved / TENSORS_NAME).unlink()
    with pytest.raises(ArtifactError, match="the artifact is incomplete"):
        Artifact.load(saved)


def test_a_pickle_in_the_place_of_the_tensors_is_refused_unread(saved):
    torch.save({"x": torch.zeros(1)}, saved / TENSORS_NAME)
    rewrite(saved)
    with pytest.raises(ArtifactError, match="is no safetensors file"):
        Artifact.load(saved)


SITE = "down_blocks.0.resnets.0.conv1"


def _set(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return apply


TENSOR_FAULTS = {
    "missing tensor": (lambda t: t.pop(f"sites.{SITE}.weight_scale"), "weight_scale' is missing"),
    "missing parameter": (lambda t: t.pop("params.conv_in.bias"), r"parameter 'conv_in\.bias' is missing"),
    "foreign tensor": (lambda t: t.update({"sites.nothing.codes": torch.zeros(2)}), "belongs to nothing"),
    "foreign parameter": (lambda t: t.update({"params.nothing": torch.zeros(2)}), "not one of the model's"),
    "wrong type": (_set(f"sites.{SITE}.act_scale", lambda x: x.double()), r"is torch\.float64, expected torch\.float32"),
    "wrong shape": (_set(f"sites.{SITE}.weight_scale", lambda x: x[:-1]), r"weight_scale has shape \[7\], expected \[8\]"),
    "wrong parameter shape": (_set("params.conv_in.bias", lambda x: x[:-1]), r"has shape \[7\], expected \[8\]"),
    "NaN scale": (_set(f"sites.{SITE}.act_scale", lambda x: x * float("nan")), "not finite and positive"),
    "NaN weight scale": (_set(f"sites.{SITE}.weight_scale", lambda x: x * float("nan")), "weight_scale holds a value"),
    "NaN parameter": (_set("params.conv_in.bias", lambda x: x * float("nan")), "holds NaN or infinity"),
    "zero scale": (_set(f"sites.{SITE}.act_scale", lambda x: x * 0), "not finite and positive"),
    "scale per channel": (_set(f"sites.{SITE}.act_scale", lambda x: x[:, None].expand(-1, 8)), "fits no integer kernel"),
    "qmin above zero": (_set(f"sites.{SITE}.act_qmin", lambda x: x.abs()), "exclude code 0"),
    "bounds too wide": (_set(f"sites.{SITE}.act_qmax", lambda x: x + 5), "more than the 16 of 4 bits"),
    "packed too short": (_set(f"sites.{SITE}.codes", lambda x: x[:-1]), "expected 576 of shape"),
    "rows outside": (_set("row_of_timestep", lambda x: x + 100), "points outside its 5 table rows"),
    "timesteps unsorted": (_set("timesteps", lambda x: x.flip(0)), "not ascending"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_a_faulty_tensor_ends_in_one_clear_error(saved, fault):
    spoil, message = TENSOR_FAULTS[fault]
    tensors = dict(load_file(saved / TENSORS_NAME))
    spoil(tensors)
    rewrite(saved, tensors)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(saved)


def test_codes_outside_their_bits_are_refused(artifact_w4a4, tmp_path):
    site = artifact_w4a4.sites[SITE]
    wide = replace(site, codes=torch.full_like(site.codes, 9))
    with pytest.raises(ArtifactError, match=r"codes reach \[9, 9\], outside \[-8, 7\] of 4 bits"):
        replace(artifact_w4a4, sites={**artifact_w4a4.sites, SITE: wide}).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "unet9d"}, "No family 'unet9d'"),
        ({"config": {"in_channels": 3}}, "."),
        ({"sites": {}}, "."),
        ({"sites": {"nowhere": {}}}, "."),
        ({"sites": 3}, "does not describe"),
        ({"config": None}, "does not describe"),
        ({"structure": {"branches": {"nowhere": 4}}}, "Layer 'nowhere' is not a convolution or linear layer of this model"),
        (
            {"structure": {"branches": {SITE: 0}}},
            rf"Layer '{SITE}' cannot have a branch of rank 0: expected 1 to 8, the rank of its weight",
        ),
        ({"structure": {"branches": {SITE: 10**12}}}, "expected 1 to 8"),
        ({"structure": {"branches": {SITE: "4"}}}, rf'structure\.branches\["{SITE}"\] is "4", expected an integer'),
        ({"structure": {"branches": {SITE: 4}}}, rf"Artifact has site '{SITE}', which the unet2d model of its config does not have"),
    ],
    ids=[
        "family",
        "config",
        "no sites",
        "unknown site",
        "sites no object",
        "config no object",
        "branch of no layer",
        "branch of rank 0",
        "branch too wide",
        "rank no number",
        "no base",
    ],
)
def test_a_description_that_does_not_fit_is_one_clear_error(saved, change, message):
    rewrite(saved, **change)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(saved)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config", {"layers_per_block": 20000}, "more than 6000 parameter tensors, more than any published model has"),
        ("config", {"sample_size": 10**12}, r"config\.sample_size is 1000000000000, expected a number below 2\^31"),
        ("config", {"block_out_channels": [-8, 16]}, "diffusers cannot build UNet2DModel from this config"),
        ("config", {"block_out_channels": [1 << 30, 1 << 30]}, "diffusers cannot build UNet2DModel from this config: .*overflow"),
        ("sites", {SITE: {"weight_bits": True}}, rf"sites\[\"{SITE}\"\]\.weight_bits is true, expected an integer"),
        ("sites", {SITE: {"weight_bits": 9}}, r"\.weight_bits is 9, expected an integer <= 8"),
        ("sites", {SITE: {"op": "conv3d"}}, r'\.op is "conv3d", expected "conv2d" or "linear"'),
        ("sites", {SITE: {"weight_shape": [8, 8, 3, 10**12]}}, r"\.weight_shape\[3\] is 1000000000000, expected an integer <= 16777216"),
        ("sites", {SITE: {"weight_shape": [8, "8"]}}, r'\.weight_shape\[1\] is "8", expected an integer'),
    ],
    ids=str,
)
def test_a_number_out_of_bounds_is_refused_by_its_field(saved, field, value, message):
    content = json.loads((saved / JSON_NAME).read_text())[field]
    changed = {name: content[name] | entry if isinstance(entry, dict) else entry for name, entry in value.items()}
    rewrite(saved, **{field: content | changed})
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(saved)


def test_deeply_nested_json_is_refused(saved):
    for depth in (100, 100_000):
        (saved / JSON_NAME).write_text('{"config": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ArtifactError, match="nested deeper than 32 levels"):
            Artifact.load(saved)


def test_infinity_is_refused(saved):
    rewrite(saved, provenance={"seconds": float("inf")})
    with pytest.raises(ArtifactError, match=r"provenance\.seconds is inf, expected a finite number"):
        Artifact.load(saved)


def test_a_file_of_many_gigabytes_is_refused_unread(saved):
    with (saved / JSON_NAME).open("r+") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(ArtifactError, match="has 1099511627776 bytes, expected at most 67108864 of json"):
        Artifact.load(saved)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME, "model_index.json"])
def test_a_link_that_leaves_the_directory_is_refused(saved, tmp_path, name):
    (saved / name).rename(tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="outside its directory"):
        Artifact.load(saved)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME, "model_index.json"])
def test_a_pipe_is_refused_unread(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(ArtifactError, match="is not a regular file"):
        Artifact.load(saved)


@pytest.mark.parametrize("change", [{"digest": "0" * 64}, {"family": "unet2d-condition"}, {"folded": ["conv_in"]}], ids=str)
def test_a_description_that_its_digest_does_not_cover_is_refused(saved, change):
    description = json.loads((saved / JSON_NAME).read_text())
    (saved / JSON_NAME).write_text(json.dumps(description | change))
    with pytest.raises(ArtifactError, match=r"artifact\.json was changed or damaged: its digest is"):
        Artifact.load(saved)


def test_the_provenance_may_be_annotated(saved):
    description = json.loads((saved / JSON_NAME).read_text())
    (saved / JSON_NAME).write_text(json.dumps(description | {"provenance": {"note": "of mine"}}))
    assert Artifact.load(saved).provenance == {"note": "of mine"}


def full_disk(path, _):
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_leaves_nothing_behind(artifact_w4a4, tmp_path, monkeypatch):
    monkeypatch.setattr("edm_deploy.artifact.artifact.write_tensors", full_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        artifact_w4a4.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_old_artifact(saved, artifact_w8a8, monkeypatch):
    before = Artifact.load(saved).digest
    with monkeypatch.context() as patch:
        patch.setattr("edm_deploy.artifact.artifact.write_tensors", full_disk)
        with pytest.raises(ArtifactError, match="No space left"):
            artifact_w8a8.save(saved)
    assert Artifact.load(saved).digest == before


def test_a_directory_that_holds_something_else_is_not_replaced(artifact_w4a4, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds other files"):
        artifact_w4a4.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file, save_file

from edm_deploy.pipelines.source import load_source
from edm_deploy.storage.weight_loading import cast, empty_model, load_weights, widen_while_running
from tests.conftest import tiny_inputs, tiny_model


def saved(model, directory, dtype=torch.float32, shards=1):
    """The model's tensors as diffusers would save them."""
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, directory / "diffusion_pytorch_model.safetensors")
        return directory
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for part, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, directory / part)
    index = {"weight_map": {name: part for part, inside in parts.items() for name in inside}}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def filled(directory, kind="unet2d", **options):
    family, config, _ = tiny_model(kind)
    model = empty_model(lambda: family.build(config))
    assert load_weights(model, directory, **options)
    return model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["unet2d", "unet2d-classes", "unet2d-condition"])
def test_a_filled_model_is_the_one_that_was_saved(kind, shards, tmp_path):
    family, _, model = tiny_model(kind)
    found = filled(saved(model, tmp_path, shards=shards), kind)
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    inputs = tiny_inputs(kind)
    torch.testing.assert_close(family.forward(found, inputs), family.forward(model, inputs))


def test_a_file_is_mapped_again_after_each_window(tmp_path, monkeypatch):
    _, _, model = tiny_model("unet2d")
    monkeypatch.setattr("edm_deploy.storage.weight_loading.WINDOW_BYTES", 1000)
    found = filled(saved(model, tmp_path))
    assert all(torch.equal(found.state_dict()[name], value) for name, value in model.state_dict().items())


def test_parameters_are_not_filled_before_their_turn_and_torchs_random_state_stays():
    family, config, _ = tiny_model("unet2d")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = empty_model(lambda: family.build(config))
    assert torch.equal(torch.rand(1), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_files_with_other_names_are_left_to_diffusers(tmp_path):
    family, config, model = tiny_model("unet2d")
    path = saved(model, tmp_path) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["old_name"] = tensors.pop("conv_in.bias")
    save_file(tensors, path)
    assert not load_weights(empty_model(lambda: family.build(config)), tmp_path)


def test_a_damaged_file_is_a_value_error(tmp_path):
    family, config, _ = tiny_model("unet2d")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="header"):
        load_weights(empty_model(lambda: family.build(config)), tmp_path)


@pytest.mark.parametrize("kind", ["unet2d", "unet2d-classes", "unet2d-condition"])
def test_mapped_float16_weights_compute_what_float32_ones_do(kind, tmp_path):
    family, _, model = tiny_model(kind)
    saved(model, tmp_path, torch.float16)
    mapped = filled(tmp_path, kind, keep=True)
    widen_while_running(mapped)
    inputs = tiny_inputs(kind)
    assert torch.equal(family.forward(mapped, inputs), family.forward(filled(tmp_path, kind), inputs))
    assert {parameter.dtype for parameter in mapped.parameters()} == {torch.float16}


def test_a_layer_is_narrow_again_after_it_has_failed(tmp_path):
    _, _, model = tiny_model("unet2d")
    mapped = filled(saved(model, tmp_path, torch.float16), keep=True)
    widen_while_running(mapped)
    with pytest.raises(RuntimeError):
        mapped.conv_in(torch.zeros(1, 99, 8, 8))
    assert mapped.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_a_mapped_model_that_is_cast_computes_in_the_type_it_was_cast_to(stored, tmp_path):
    family, _, model = tiny_model("unet2d")
    mapped = filled(saved(model, tmp_path, stored), keep=True)
    widen_while_running(mapped)
    inputs = {name: value.bfloat16() if name != "timestep" else value for name, value in tiny_inputs("unet2d").items()}
    usual = torch.nn.Module.to(cast(filled(tmp_path), torch.bfloat16), memory_format=torch.channels_last)
    # The same layout on both sides: bfloat16 convolutions of another one sum in another order.
    output = family.forward(torch.nn.Module.to(cast(mapped, torch.bfloat16), memory_format=torch.channels_last), inputs)
    expected = family.forward(usual, inputs)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    assert {parameter.dtype for parameter in mapped.parameters()} == {torch.bfloat16}


def test_low_memory_gives_the_same_source(save_tiny_pipeline, tmp_path):
    path = save_tiny_pipeline(tmp_path / "p")
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    usual, low = load_source(path), load_source(path, low_memory=True)
    assert low.model.conv_in.weight.dtype == torch.float16
    assert usual.model.conv_in.weight.dtype == torch.float32
    assert low.digest() == usual.digest()


def test_a_cast_says_nothing_of_parts_that_stay_in_float32(capfd):
    _, _, model = tiny_model("flux")
    assert cast(model, torch.bfloat16) is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "float32" not in capfd.readouterr().err


@pytest.mark.parametrize("size", ["10GB", "30KB"])
def test_weights_of_one_variant_only_are_loaded_and_named(size, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr("edm_deploy.pipelines.source.log.warning", lambda text, *values: notes.append(text % values))
    _, _, model = tiny_model("unet2d")
    DDIMPipeline(model, DDIMScheduler()).save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert (len(list((tmp_path / "unet").glob("*.fp16*.safetensors"))) > 1) == (size == "30KB")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_source(tmp_path).model.state_dict().items())
    assert notes == [f"{tmp_path / 'unet'} has weights of the variant fp16 only; they are loaded."]

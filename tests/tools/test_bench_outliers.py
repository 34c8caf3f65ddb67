import torch

from edm_deploy_tools.bench_outliers import Outliers, _main, outlier_source

TINY = {"num_attention_heads": 2, "attention_head_dim": 64, "sample_size": 4, "num_layers": 1, "num_embeds_ada_norm": 10}


def inputs_of(source):
    """The input of every linear layer of the block."""
    found = {}
    layers = {name: layer for name, layer in source.model.transformer_blocks[0].named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, -2)))
    inputs = {"sample": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), "timestep": torch.tensor([10.0, 900.0])}
    output = source.family_object.forward(source.model, inputs | {"class_labels": torch.tensor([1, 2])})
    return found, output


def test_few_channels_of_every_layer_s_input_are_ten_times_the_others():
    found, _ = inputs_of(outlier_source(0, Outliers(), **TINY))
    for name in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
        size = found[name].abs().mean(0)
        assert 1 <= int((size > 6 * size.median()).sum()) <= len(size) // 32, name


def test_full_compensation_preserves_the_function_except_behind_the_activation():
    """A GELU of a larger value is not the larger GELU, so the last layer of the block is left out."""
    plain, scaled = (inputs_of(outlier_source(0, outliers, **TINY))[0] for outliers in (None, Outliers(compensation=1.0)))
    differs = ((plain["ff.net.0.proj"] - scaled["ff.net.0.proj"]).abs().mean(0) > 1e-3).nonzero()
    assert len(differs) == 1, "only the outlier channel itself differs"


def test_rotation_halves_the_error_at_w4a4(capsys):
    config = [f"--config={key}={value}" for key, value in TINY.items()]
    errors = []
    for setting in ("off", "all"):
        _main(["--seeds", "1", "--samples", "2", "--steps", "3", *config, "--set", "rows=3", "--set", f"rotate={setting}"])
        errors.append(float(capsys.readouterr().out.rpartition("noise error ")[2].split(";")[0]))
    assert errors[1] < 0.5 * errors[0], "0.18 of it"

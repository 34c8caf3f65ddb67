import pytest
import torch

from calibration.recipes.mse import Mse
from calibration.reconstruction import block_cache
from calibration.reconstruction.block_cache import ModelInputs, entropies_of, fill_block_cache
from calibration.reconstruction.blocks import blocks_of
from calibration.student.teacher import Teacher
from edm_deploy.numerics.activation_table import table_rows
from tests.calibration.tiny import tiny_source
from tests.conftest import tiny_inputs

CPU = torch.device("cpu")


def network(kind):
    """Teacher, a student whose scales differ by row, and samples at five timesteps."""
    source = tiny_source(kind)
    teacher = Teacher(source, CPU)
    student = Mse(weight_bits=4, act_bits=4).student(source, torch.tensor([0, 500], dtype=torch.int32), CPU, teacher=teacher)
    for quantizer in student.quantizers.values():
        with torch.no_grad():
            quantizer.log_scale.copy_(torch.tensor([-1.0, -1.5]))
            if quantizer.qmin.requires_grad:
                quantizer.qmin.fill_(-7.0)
    return teacher, student, ModelInputs(tiny_inputs(kind, batch=5))


def results(model, forward, name, inputs):
    """The results of a module within a whole forward pass."""
    outputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        forward(inputs)
    handle.remove()
    return block_cache.tensors_of(outputs[0])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("unet2d", "up_blocks.0.resnets.0"),
        ("unet2d-condition", "mid_block.attentions.0.transformer_blocks.0"),
        ("sd3", "transformer_blocks.0"),
        ("flux", "transformer_blocks.0"),
    ],
)
def test_a_block_run_alone_computes_what_it_computes_in_the_network(kind, name):
    teacher, student, inputs = network(kind)
    block = next(block for block in blocks_of(student, "block") if block.name == name)
    kept = fill_block_cache(block, student, teacher, inputs)
    assert kept.rows.tolist() == table_rows(student.row_of_timestep, inputs.values["timestep"]).tolist()
    chosen = torch.tensor([4, 0, 3, 1])  # rows 1, 0, 1, 0
    with torch.no_grad():
        alone = kept.outputs(student, chosen)
    within = results(student.model, student, name, inputs.values)
    assert len(alone) == len(within)
    for ours, theirs in zip(alone, within, strict=True):
        # The same numbers in another batch: where float32 sums are ordered differently, one rounding tie may change a whole sample.
        close = torch.isclose(ours, theirs[chosen], rtol=1e-4, atol=1e-4).flatten(1).all(1)
        assert int(close.sum()) >= len(chosen) - 1
    for target, theirs in zip(kept.targets, results(teacher.model, teacher, name, inputs.values), strict=True):
        torch.testing.assert_close(target.batch(chosen), theirs[chosen])


def test_feature_maps_keep_the_layout_that_they_were_cached_in():
    teacher, student, inputs = network("unet2d")
    block = next(block for block in blocks_of(student, "block") if block.name == "conv_in")
    plain = fill_block_cache(block, student, teacher, inputs)
    student.channels_last = True
    kept = fill_block_cache(block, student, teacher, inputs)
    chosen = torch.tensor([4, 0, 3])
    (given,) = (leaf for leaf in kept.inputs[0] if leaf.count)
    found = given.batch(chosen)
    assert found.is_contiguous(memory_format=torch.channels_last) and not found.is_contiguous()
    assert torch.equal(found, next(leaf for leaf in plain.inputs[0] if leaf.count).batch(chosen))


def test_the_distance_sums_over_channels_and_means_over_the_rest():
    teacher, student, inputs = network("unet2d")
    block = next(block for block in blocks_of(student, "block") if block.name == "conv_in")
    kept = fill_block_cache(block, student, teacher, inputs)
    chosen = torch.arange(5)
    with torch.no_grad():
        (output,) = kept.outputs(student, chosen)
        distance = kept.reconstruction_error(student, chosen, torch.ones(2))
        weighted = kept.reconstruction_error(student, chosen, torch.tensor([1.5, 0.5]))
    expected = (output - kept.targets[0].batch(chosen)).square().sum(1).mean()
    torch.testing.assert_close(distance, expected)
    assert set(kept.rows.tolist()) == {0, 1}
    by_row = torch.tensor([1.5, 0.5])[kept.rows].view(5, 1, 1, 1)
    torch.testing.assert_close(weighted, ((output - kept.targets[0].batch(chosen)).square() * by_row).sum(1).mean())
    assert float(distance) > 0


def test_the_second_of_two_joined_modules_receives_the_result_of_the_first():
    teacher, student, inputs = network("unet2d")
    bits = dict.fromkeys(student.layers, 4.0) | {site: 8.0 for site in student.layers if site.startswith("mid_block.attentions.0.")}
    blocks = blocks_of(student, "entropy", bits)
    pair = next(block for block in blocks if "mid_block.attentions.0" in block.modules)
    assert len(pair.modules) == 2
    kept = fill_block_cache(pair, student, teacher, inputs)
    chosen = torch.arange(5)
    with torch.no_grad():
        before = kept.outputs(student, chosen)[1]
        student.layers[f"{pair.modules[0]}.conv2"].layer.bias.data = student.layers[f"{pair.modules[0]}.conv2"].layer.bias + 3.0
        after = kept.outputs(student, chosen)[1]
    assert not torch.allclose(before, after)
    assert [leaf.value for leaf, index in zip(kept.inputs[1], range(9), strict=False) if index in pair.calls[1].wired] == [None]


def test_a_cache_is_bounded_and_its_samples_evenly_spread(monkeypatch):
    monkeypatch.setattr(block_cache, "CACHE_BYTES", 0)
    monkeypatch.setattr(block_cache, "FORWARD_BATCH", 2)
    teacher, student, inputs = network("unet2d")
    kept = fill_block_cache(blocks_of(student, "block")[0], student, teacher, inputs)
    expected = table_rows(student.row_of_timestep, inputs.values["timestep"][[0, 2]])
    assert kept.rows.tolist() == expected.tolist()


def test_samples_are_divided_into_batches_and_spread():
    inputs = ModelInputs({"sample": torch.arange(7.0)[:, None], "timestep": torch.arange(7.0)})
    assert [len(part["timestep"]) for part in inputs.batches(3)] == [3, 3, 1]
    assert inputs.spread(3).values["timestep"].tolist() == [0.0, 2.0, 4.0]
    assert inputs.spread(9) is inputs


def test_every_site_has_an_entropy():
    teacher, student, inputs = network("unet2d")
    found = entropies_of(teacher, inputs, student.layers)
    assert set(found) == set(student.layers)
    assert all(0 < bits <= 8 for bits in found.values())

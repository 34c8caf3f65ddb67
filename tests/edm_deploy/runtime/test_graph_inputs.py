import contextlib
from dataclasses import replace

import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.runtime.graph_inputs import InputChecks, nan_where_not_finite
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from tests.conftest import TINY, artifact_by_hand, tiny_inputs


def checks_of(kind: str, **profile: ShapeRange) -> InputChecks:
    """The checks of an engine of a tiny model, of any batch unless `profile` has one."""
    artifact = artifact_by_hand(kind)
    manifest = Manifest.of(artifact, {name: name for name in artifact.sites}, kind="onnx", dtype="fp32", weight_storage="int8")
    manifest.profile.update(profile)
    return InputChecks(manifest, family_named(manifest.family), torch.device("cpu"), last_timestep=999)


@pytest.fixture(scope="module")
def with_classes():
    return checks_of("unet2d-classes", batch=ShapeRange(1, 2, 4), height=ShapeRange(8, 8, 8))


@pytest.mark.parametrize("kind", TINY)
def test_what_a_model_takes_passes_unchanged(kind):
    inputs = tiny_inputs(kind)
    converted = checks_of(kind).converted(inputs)
    assert list(converted) == list(inputs)
    assert all(torch.equal(converted[name], value) for name, value in inputs.items())


def test_a_timestep_of_the_cpu_is_checked_there_before_it_is_moved():
    """On a GPU, reading a value waits for the step before. Device meta has no values to read."""
    checks = replace(checks_of("unet2d"), device=torch.device("meta"))
    assert checks._timesteps(999, 2).device.type == "meta"
    with pytest.raises(InputError, match="timestep 1000 is outside the schedule"):
        checks._timesteps(1000, 2)


LABELS = {
    "one over": (torch.tensor([0, 5]), "class_labels holds 5, expected 0 to 4. Pass indices of the model's classes, from 0"),
    "negative": (torch.tensor([4, -1]), "class_labels holds -1, expected 0 to 4"),
    "huge": (torch.tensor([1000000, 0]), "class_labels holds 1000000, expected 0 to 4"),
    "floats": (torch.tensor([1.0, 0.0]), "class_labels is torch.float32, expected integers. Convert it with .to(torch.int64)"),
    "NaN": (torch.tensor([float("nan"), 0.0]), "class_labels is torch.float32, expected integers"),
    "bools": (torch.tensor([True, False]), "class_labels is torch.bool, expected integers"),
    "column": (torch.tensor([[1], [0]]), "class_labels has shape [2, 1], expected 1 dimensions ['batch']. Reshape it"),
    "scalar": (torch.tensor(1), "class_labels has shape [], expected 1 dimensions ['batch']"),
    "another batch": (torch.tensor([1]), "class_labels has batch 1, another input has 2. Make them equal"),
    "a list": ([1, 2], "class_labels is list, expected a tensor. Convert it with torch.as_tensor"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_none_of_the_model_s_are_refused(with_classes, case):
    labels, message = LABELS[case]
    with pytest.raises(InputError) as error:
        with_classes.converted(tiny_inputs("unet2d-classes", batch=2) | {"class_labels": labels})
    assert message in str(error.value)


def test_labels_of_any_integer_type_are_converted(with_classes):
    inputs = tiny_inputs("unet2d-classes", batch=2) | {"class_labels": torch.tensor([4, 0], dtype=torch.uint8)}
    assert torch.equal(with_classes.converted(inputs)["class_labels"], torch.tensor([4, 0]))


def test_the_label_of_no_class_is_taken_where_the_model_has_one():
    checks, inputs = checks_of("dit"), tiny_inputs("dit", batch=2)
    none = torch.tensor([1000, 0])
    assert torch.equal(checks.converted(inputs | {"class_labels": none})["class_labels"], none)
    with pytest.raises(InputError, match="class_labels holds 1001, expected 0 to 1000, of which 1000 is no class"):
        checks.converted(inputs | {"class_labels": none + 1})


SAMPLE = torch.zeros(2, 3, 8, 8)
MISUSE = {
    "sample missing": ({"sample": None}, "There is no input 'sample'; expected sample, timestep, class_labels. Pass it"),
    "sample of complex numbers": ({"sample": SAMPLE.to(torch.complex64)}, "sample is torch.complex64, expected a floating-point tensor"),
    "sparse sample": (
        {"sample": SAMPLE.to_sparse()},
        "sample is a tensor of torch.sparse_coo, expected a dense one. Convert it with .to_dense()",
    ),
    "no samples": ({"sample": SAMPLE[:0]}, "batch is 0, expected 1 or more. Pass tensors that are not empty"),
    "odd size": ({"sample": SAMPLE[:, :, :, :7]}, "width 7 is not a multiple of 2, which this model's levels need. Crop or pad the sample"),
    "timestep of text": (
        {"timestep": "5"},
        "timestep is str, expected a number, or a tensor of one number for each sample. Pass an element of",
    ),
    "complex timestep": ({"timestep": 1 + 2j}, "timestep is torch.complex64 of shape [] on cpu, expected a number"),
    "timesteps in a row": ({"timestep": torch.tensor([[1, 2]])}, "timestep is torch.int64 of shape [1, 2] on cpu, expected a number"),
    "timesteps of bools": ({"timestep": torch.tensor([True, False])}, "timestep is torch.bool of shape [2] on cpu, expected a number"),
    "timestep without data": (
        {"timestep": torch.zeros(2, device="meta")},
        "timestep is torch.float32 of shape [2] on meta, expected a number",
    ),
    "no timesteps": ({"timestep": []}, "0 timesteps for a batch of 2; expected one, or one for each sample"),
    "infinite timestep": ({"timestep": float("inf")}, "timestep inf is outside the schedule; expected 0 to 999"),
    "huge timestep": ({"timestep": 10**400}, "timestep is int, expected a number"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_other_inputs_that_the_engine_was_not_built_for_are_refused(with_classes, case):
    changed, message = MISUSE[case]
    inputs = tiny_inputs("unet2d-classes", batch=2) | changed
    with pytest.raises(InputError) as error:
        with_classes.converted({name: value for name, value in inputs.items() if value is not None})
    assert message in str(error.value)


ODD = [
    *(None, 0, -1, 1.5, True, 1j, float("nan"), 10**30, "x", [1], [], {}, object()),
    *(torch.tensor(1.0), torch.tensor([]), torch.zeros(2, 2), torch.zeros(0, 3, 8, 8), torch.tensor([2**62, -(2**62)])),
    *(torch.zeros(2, dtype=dtype) for dtype in (torch.bool, torch.complex64, torch.uint64, torch.float8_e4m3fn)),
    *(torch.zeros(2, device="meta"), torch.zeros(2, 3).to_sparse()),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, for the two that are made here
@pytest.mark.parametrize("kind", TINY)
def test_whatever_is_passed_is_converted_or_refused(kind):
    checks, good = checks_of(kind), tiny_inputs(kind, batch=2)
    nested, quantized = (
        torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
        torch.quantize_per_tensor(torch.zeros(2), 1, 0, torch.qint8),
    )
    parameters = {graph: parameter for parameter, graph in checks.family.renamed.items()}
    for name in good:
        for value in [*ODD, nested, quantized]:
            arguments = {parameters.get(key, key): each for key, each in (good | {"timestep": torch.ones(2), name: value}).items()}
            with contextlib.suppress(InputError, UnsupportedError):
                converted = checks.converted(checks.family.bind(checks.manifest.config, (), arguments))
                assert all(each.shape == good[key].shape and each.dtype == good[key].dtype for key, each in converted.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"encoder_hidden_states": torch.zeros(2, 77, 12, dtype=torch.complex64)},
            "encoder_hidden_states is torch.complex64, expected real",
        ),
        (
            {"encoder_hidden_states": torch.zeros(2, 77, 11)},
            "encoder_hidden_states has shape [2, 77, 11], expected ['batch', 'tokens', 12]",
        ),
        ({"encoder_hidden_states": torch.zeros(2, 0, 12)}, "tokens is 0, expected 1 or more"),
        ({"encoder_hidden_states": torch.zeros(1, 77, 12)}, "encoder_hidden_states has batch 1, another input has 2. Make them equal"),
        ({"encoder_hidden_states": "a cat"}, "encoder_hidden_states is str, expected a tensor"),
    ],
    ids=["complex", "width", "no tokens", "batch", "text"],
)
def test_text_that_the_engine_was_not_built_for_is_refused(changed, message):
    with pytest.raises(InputError) as error:
        checks_of("unet2d-condition").converted(tiny_inputs("unet2d-condition", batch=2) | changed)
    assert message in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_makes_its_sample_nan(bad):
    inputs = {"sample": torch.ones(3, 2, 4, 4), "timestep": torch.zeros(3), "tokens": torch.ones(3, 5, 2), "guidance": torch.ones(3)}
    prediction = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nan_where_not_finite(prediction, inputs), prediction)
    for row, name in enumerate(("sample", "tokens", "guidance")):
        changed = inputs[name].clone()
        changed.view(3, -1)[row, -1] = bad
        found = nan_where_not_finite(prediction, inputs | {name: changed})
        assert found.isnan().flatten(1).all(1).tolist() == [number == row for number in range(3)]
        assert torch.equal(found[found.isfinite()], prediction[torch.arange(3) != row].flatten())


def test_a_sample_beyond_float16_is_predicted_as_nan_by_an_engine_of_float16():
    inputs = {"sample": torch.tensor([[1e5], [1.0]]).half()}
    assert nan_where_not_finite(torch.ones(2, 1), inputs).isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize(
    ("kind", "batch", "size", "message"),
    [
        ("sd3", 1, 26, "height is 26, expected at most 24: no engine of this model takes more"),
        ("sd3", 65537, 8, "batch is 65537, expected at most 65536: no engine"),
        ("sd3", 1, 24, "height 24 is outside the engine's profile 8:8:8. Use smaller pieces, or build again with --height 8:8:24"),
    ],
)
def test_a_larger_profile_is_proposed_only_where_an_engine_can_have_it(kind, batch, size, message):
    checks = checks_of(kind, batch=ShapeRange(1, 2, 4), height=ShapeRange(8, 8, 8), width=ShapeRange(8, 8, 8))
    inputs = tiny_inputs(kind, batch=1)
    sample = torch.zeros(1, 4, size, 8).expand(batch, -1, -1, -1)
    with pytest.raises(InputError) as error:
        checks.converted(inputs | {"sample": sample, "timestep": torch.zeros(batch)})
    assert message in str(error.value)

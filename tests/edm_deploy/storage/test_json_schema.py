from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from edm_deploy.errors import ArtifactError
from edm_deploy.storage import json_schema
from edm_deploy.storage.json_schema import MAX_DEPTH, check_bounded, check_config, convert
from tests.mutations import nested


@dataclass(frozen=True)
class Inner:
    op: Literal["conv2d", "linear"]
    bits: Annotated[int, Meta(ge=2, le=8)] = 4
    scale: float = 1.0
    dims: tuple[str | int, ...] = ()

    def __post_init__(self):
        if self.bits == 7:
            raise ValueError("seven bits")


@dataclass(frozen=True)
class Outer:
    layers: dict[str, Inner]
    spans: tuple[tuple[int, int], ...] = ()
    note: str | None = None
    extra: dict[str, dict[str, Inner]] = field(default_factory=dict)


GOOD = {"layers": {"a": {"op": "linear"}, "b.0": {"op": "conv2d", "bits": 8, "scale": 2, "dims": ["batch", 3]}}, "spans": [[0, 4]]}


def test_what_fits_is_converted_with_its_defaults():
    found = convert(GOOD, Outer)
    assert found.layers["a"] == Inner("linear", 4, 1.0, ())
    assert found.layers["b.0"] == Inner("conv2d", 8, 2.0, ("batch", 3))
    assert found.spans == ((0, 4),)


def layer(**changes):
    return GOOD | {"layers": {"a": {"op": "linear"}, "b.0": {"op": "linear"} | changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "The file has no field 'layers'."),
        ({"layers": 3}, "layers is 3, expected an object."),
        ({"layers": {"x y": {}}}, "layers[\"x y\"] has no field 'op'."),
        (layer(bits=True), 'layers["b.0"].bits is true, expected an integer.'),
        (layer(bits=4.0), 'layers["b.0"].bits is 4.0, expected an integer.'),
        (layer(bits="4"), 'layers["b.0"].bits is "4", expected an integer.'),
        (layer(bits=9), 'layers["b.0"].bits is 9, expected an integer <= 8.'),
        (layer(bits=7), 'layers["b.0"]: seven bits.'),
        (layer(op="conv3d"), 'layers["b.0"].op is "conv3d", expected "conv2d" or "linear".'),
        (layer(op=None), 'layers["b.0"].op is null, expected a string.'),
        (layer(scale=10**400), 'layers["b.0"].scale is an integer of more than 18 digits, expected a smaller number.'),
        (layer(dims=["batch", None]), 'layers["b.0"].dims[1] is null, expected an integer or a string.'),
        (GOOD | {"spans": [[0, 1], [1, 2, 3]]}, "spans[1] is an array of 3 entries, expected an array of length 2."),
        (GOOD | {"note": {"a": 1}}, "note is an object of 1 entries, expected a string or null."),
        (GOOD | {"extra": {"p": {}, "q": {"r": {"op": "linear"}, "s": {"op": 1}}}}, "extra.q.s.op is 1, expected a string."),
        (GOOD | {"note": 3}, "note is 3, expected a string or null."),
    ],
    ids=str,
)
def test_a_message_names_the_field_its_value_and_what_is_expected(content, message):
    with pytest.raises(ArtifactError) as error:
        convert(content, Outer)
    assert str(error.value) == message


def test_the_one_wrong_entry_of_many_is_named_with_few_conversions(monkeypatch):
    calls = []
    error_of = json_schema._error
    monkeypatch.setattr(json_schema, "_error", lambda *arguments: calls.append(None) or error_of(*arguments))
    layers = {f"layer{index}": {"op": "linear"} for index in range(1000)} | {"wrong": {"op": 3}}
    with pytest.raises(ArtifactError, match=r"^layers\.wrong\.op is 3, expected a string"):
        convert({"layers": dict(sorted(layers.items(), key=lambda item: item[0] != "layer7"))}, Outer)
    assert len(calls) <= 10


def test_of_several_wrong_fields_one_is_named_with_its_own_key():
    layers = {f"layer{index}": {"op": "linear"} for index in range(9)} | {"wrong": {"op": 3}, "worse": {"bits": None}}
    with pytest.raises(ArtifactError, match=r"^layers\.wrong\.op is 3, expected a string"):
        convert({"layers": layers, "spans": 3, "note": 4}, Outer)


def test_the_path_of_the_content_itself_comes_first():
    with pytest.raises(ArtifactError, match=r"^build\.layers is 3"):
        convert({"layers": 3}, Outer, path="build")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD | {"surprise": 1}, 'The file has a field "surprise", expected layers, spans, note, extra.'),
        (layer(bit=4), r'layers\["b\.0"\] has a field "bit", expected op, bits, scale, dims\. Did you mean'),
        (GOOD | {"extra": {"p": {"q": {"op": "linear", "x": 1}}}}, r"extra\.p\.q has a field"),
    ],
    ids=str,
)
def test_unknown_fields_are_refused_on_request(content, message):
    convert(content, Outer)
    with pytest.raises(ArtifactError, match=message):
        convert(content, Outer, forbid_unknown=True)


def test_depth_and_finiteness_are_bounded():
    check_bounded({"a": nested(MAX_DEPTH - 2)})
    with pytest.raises(ArtifactError, match="nested deeper than 32 levels"):
        check_bounded({"a": nested(MAX_DEPTH)})
    with pytest.raises(ArtifactError, match=r"^a\[1\] is nan, expected a finite number"):
        check_bounded({"a": [0.5, float("nan")]})
    check_bounded({"a": float("inf")}, finite=False)


def test_a_string_that_is_no_text_is_refused():
    check_bounded({"a": ["\u00e9\U0001f600"]})
    for content in ({"a": ["\ud800"]}, {"\udfff": 1}):
        with pytest.raises(ArtifactError, match="expected text without lone surrogates"):
            check_bounded(content, finite=False)


@pytest.mark.parametrize("value", [2**31, -(2**31), 1e10, [1] * 5000, "x" * 5000], ids=lambda value: str(value)[:12])
def test_a_config_has_no_numbers_or_lists_beyond_any_models(value):
    check_config({"norm_eps": 1e-5, "layers": [1, 2**30]})
    with pytest.raises(ArtifactError, match=r"config\.a\[0\] (is|has length) .*, expected"):
        check_config({"a": [value]})

"""Strict decoding of json into dataclasses: exact types, bounded sizes, and errors that name the field, its value and what is expected."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

from edm_deploy.errors import ArtifactError
from edm_deploy.registry import suggestion

T = TypeVar("T")

MAX_DEPTH = 32  # of nested objects and arrays; the files of edm-deploy and diffusers have at most eight
MAX_TIMESTEPS = 100_000  # of a training schedule; published models have 1000
MAX_CONFIG_NUMBER = 2**31
MAX_CONFIG_LENGTH = 4096  # entries of a list, characters of a string

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Timesteps = Annotated[int, Meta(ge=1, le=MAX_TIMESTEPS)]
Timestep = Annotated[int, Meta(ge=0, lt=MAX_TIMESTEPS)]
Scheme = Annotated[str, Meta(pattern=r"^(W\d+A\d+|float)$")]
Size = Annotated[int, Meta(ge=1, le=2**24)]  # of one axis of a tensor

_WORDS = {
    "bool": "a boolean",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "object": "an object",
    "array": "an array",
    "null": "null",
}
_SHOWN = 60  # characters of a value that a message quotes


def convert(content: Any, schema: type[T], *, path: str = "", forbid_unknown: bool = False) -> T:
    """A dataclass from decoded json, without any coercion: no boolean for an integer, no string for a number.

    Args:
        content: Decoded json.
        schema: A dataclass; bounds of its fields are `msgspec.Meta` annotations.
        path: Of `content` in its file, for messages.
        forbid_unknown: Whether an object may have no field beyond those of its dataclass.

    Raises:
        ArtifactError: A field is missing, has another type or is out of bounds. The message names its path, its value and what is expected.
    """
    try:
        converted = msgspec.convert(content, schema, strict=True)
    except msgspec.ValidationError as err:
        raise ArtifactError(_message(content, schema, str(err), path)) from err
    if forbid_unknown and (problem := _unknown_field(content, inspect.type_info(schema), path)):
        raise ArtifactError(problem)
    return converted


def check_schema(schema: Any, newest: int, file: Path) -> None:
    """Raises ArtifactError where a file's schema number is not one of 1 to `newest`."""
    if isinstance(schema, bool) or not isinstance(schema, int) or not 1 <= schema <= newest:
        raise ArtifactError(
            f"{file} has schema {_shown(schema)}; this edm-deploy reads up to {newest}. Install a newer edm-deploy, or make it again."
        )


def check_bounded(content: Any, *, path: str = "", finite: bool = True) -> None:
    """Raises ArtifactError where decoded json is nested deeper than MAX_DEPTH levels, or holds an invalid string, or NaN or infinity where `finite` is set."""
    pending = [(content, path, 0)]
    while pending:
        value, place, level = pending.pop()
        if isinstance(value, str) and not _is_text(value):
            raise ArtifactError(f"{_name(place)} is {_shown(value)}, expected text without lone surrogates.")
        if finite and isinstance(value, float) and not math.isfinite(value):
            raise ArtifactError(f"{_name(place)} is {value}, expected a finite number.")
        if isinstance(value, dict | list):
            if level >= MAX_DEPTH:
                raise ArtifactError(f"{_name(path)} is nested deeper than {MAX_DEPTH} levels, expected at most {MAX_DEPTH}.")
            keys = list(value) if isinstance(value, dict) else []
            pending += [(key, f"A key of {_name(place)}", level) for key in keys if not _is_text(key)]
            pending += [(entry, f"{place}{_step(key)}", level + 1) for key, entry in _entries(value)]


def check_config(config: Mapping[str, Any], *, path: str = "config") -> None:
    """Raises ArtifactError where a model config holds a number, a list or a string too large for any model."""
    check_bounded(dict(config), path=path)
    pending: list[tuple[Any, str]] = [(dict(config), path)]
    while pending:
        value, place = pending.pop()
        if isinstance(value, int | float) and abs(value) >= MAX_CONFIG_NUMBER:
            raise ArtifactError(f"{place} is {_shown(value)}, expected a number below 2^31.")
        if isinstance(value, str | list | dict) and len(value) > MAX_CONFIG_LENGTH:
            raise ArtifactError(f"{place} has length {len(value)}, expected at most {MAX_CONFIG_LENGTH}.")
        if isinstance(value, dict | list):
            pending += [(entry, f"{place}{_step(key)}") for key, entry in _entries(value)]


def _is_text(value: str) -> bool:
    """Whether a string can be encoded: json can escape half of a surrogate pair, which is not a character."""
    return value.isascii() or re.search("[\ud800-\udfff]", value) is None


def _entries(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value))


def _step(key: Any) -> str:
    if isinstance(key, str):
        return f".{key}" if key.isidentifier() else f"[{_shown(key)}]"
    return f"[{key}]"


def _name(path: str) -> str:
    return path.removeprefix(".") or "The file"


def _shown(value: Any) -> str:
    """A value as json, shortened."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)} entries"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "an integer of more than 18 digits"
    text = json.dumps(value[: 2 * _SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _message(content: Any, schema: Any, error: str, path: str) -> str:
    """A msgspec error in words, with the path complete: msgspec writes `[...]` for the key of an object."""
    reason = error.partition(" - at `$")[0]
    value, kind = content, inspect.type_info(schema)
    whole, keys = path, _offending_keys(content, schema, error)
    for key in keys:
        value, kind = _child(value, key), _child_type(kind, key)
        whole += _step(key)
    if missing := re.match(r"Object missing required field `(.*)`", reason):
        return f"{_name(whole)} has no field {missing[1]!r}."
    if reason.startswith("Invalid enum value"):
        return f"{_name(whole)} is {_shown(value)}, expected {' or '.join(_literals(kind))}."
    if not reason.startswith(("Expected", "Number out of range", "Integer value out")):  # raised by a __post_init__
        return f"{_name(whole)}: {reason.rstrip('.')}."
    expected = re.sub(r", got .*", "", reason.removeprefix("Expected "))
    if not reason.startswith("Expected"):
        expected = "a smaller number"
    expected = re.sub(r"`([^`]*)`", lambda match: " or ".join(_WORDS.get(word, word) for word in match[1].split(" | ")), expected)
    return f"{_name(whole)} is {_shown(value)}, expected {expected.rstrip('.')}."


def _offending_keys(content: Any, schema: Any, error: str) -> list[Any]:
    """The keys and indices of an error's path; an object's key is found by bisection, converting the content with half of the entries."""
    keys: list[Any] = []
    value = content
    for step in re.findall(r"\[\.\.\.\]|\[\d+\]|\.[^.\[\]]+", error.partition(" - at `$")[2].removesuffix("`")):
        if step == "[...]":
            candidates = list(value)
            while len(candidates) > 1:
                half = candidates[: len(candidates) // 2]
                candidates = half if _error(_with_only(content, keys, half), schema) == error else candidates[len(half) :]
            key = candidates[0]
        else:
            key = int(step[1:-1]) if step.startswith("[") else step[1:]
        keys.append(key)
        value = _child(value, key)
    return keys


def _with_only(content: Any, path: list[Any], keys: list[Any]) -> Any:
    """`content` in which the object at `path` has only the entries `keys`."""
    if not path:
        return {key: content[key] for key in keys}
    inner = _with_only(content[path[0]], path[1:], keys)
    return {**content, path[0]: inner} if isinstance(content, dict) else [inner if at == path[0] else x for at, x in enumerate(content)]


def _error(content: Any, schema: Any) -> str | None:
    """The error of msgspec for a content, or None."""
    try:
        msgspec.convert(content, schema, strict=True)
    except msgspec.ValidationError as err:
        return str(err)
    return None


def _child(value: Any, key: Any) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return None


def _child_type(kind: Any, key: Any) -> Any:
    """The type of an entry; for a union, of its first member that has entries."""
    for option in getattr(kind, "types", (kind,)):
        if isinstance(option, inspect.DataclassType):
            return next((entry.type for entry in option.fields if entry.encode_name == key), None)
        if isinstance(option, inspect.DictType):
            return option.value_type
        if isinstance(option, inspect.TupleType):
            return option.item_types[key]
        if isinstance(option, inspect.VarTupleType | inspect.ListType):
            return option.item_type
    return None


def _literals(kind: Any) -> list[str]:
    for option in getattr(kind, "types", (kind,)):
        if isinstance(option, inspect.LiteralType):
            return [_shown(value) for value in option.values]
    return ["another value"]


def _unknown_field(content: Any, kind: Any, path: str) -> str | None:
    """What an object has beyond the fields of its dataclass, as a message, or None."""
    if isinstance(kind, inspect.DataclassType) and isinstance(content, dict):
        known = [entry.encode_name for entry in kind.fields]
        if unknown := sorted(set(content) - set(known)):
            return f"{_name(path)} has a field {_shown(unknown[0])}, expected {', '.join(known)}.{suggestion(unknown[0], known)}"
    entries = _entries(content) if isinstance(content, dict | list) else []
    problems = (_unknown_field(entry, _child_type(kind, key), f"{path}{_step(key)}") for key, entry in entries if _has_fields(kind))
    return next((problem for problem in problems if problem), None)


def _has_fields(kind: Any) -> bool:
    return (
        kind is not None
        and not isinstance(kind, inspect.AnyType)
        and (is_dataclass(getattr(kind, "cls", None)) or hasattr(kind, "value_type") or hasattr(kind, "item_type"))
    )

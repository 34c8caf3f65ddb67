"""Safetensors files, one tensor in memory at a time: written and hashed in one pass, read through the page cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NAMES = {  # the format's own
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A tensor as it will stand in a file.

    Attributes:
        dtype: One of NAMES.
        shape: Its shape.
        make: Gives it when its turn comes, and again when it is asked again; nobody keeps it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, value: Tensor) -> Stored:
        """A tensor that is in memory already."""
        return cls(value.dtype, tuple(value.shape), lambda: value)

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> str:
    """Write a safetensors file; the sha256 hex of it.

    Raises:
        OSError: The system refuses to write.
    """
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for piece in _pieces(tensors):
            digest.update(piece)
            stream.write(piece)
            del piece  # before the next one is made
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, Stored]) -> str:
    """The sha256 hex of the file that `write_tensors` would write."""
    digest = hashlib.sha256()
    for piece in _pieces(tensors):
        digest.update(piece)
        del piece
    return digest.hexdigest()


def raw(value: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; without a copy where they lie so in memory already."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers before Python 3.12


def _pieces(tensors: Mapping[str, Stored]) -> Iterator[bytes | memoryview]:
    """The file from its first byte to its last.

    Source: github.com/huggingface/safetensors, "Format": length of the header, header in JSON, data; wide types first, so that all lie aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, at = {}, 0
    for name in order:
        stored = tensors[name]
        header[name] = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [at, at + stored.nbytes]}
        at += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield _checked(name, tensors[name])


def _checked(name: str, stored: Stored) -> memoryview:
    value = stored.make()
    assert value.dtype == stored.dtype and tuple(value.shape) == stored.shape, name
    return raw(value)

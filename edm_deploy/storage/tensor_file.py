"""Safetensors files: written and hashed in one pass with one tensor in memory at a time, read through memory maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from edm_deploy.errors import ArtifactError, first_line
from edm_deploy.storage.directories import check_regular, sha256_of

NAMES = {  # of dtypes in the format
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
class DeferredTensor:
    """A tensor that is computed when it is written.

    Attributes:
        dtype: One of NAMES.
        shape: Shape of the tensor.
        make: Computes the tensor; called once for each pass over the file, and the result is not kept.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, value: Tensor) -> DeferredTensor:
        """A tensor that is already in memory."""
        return cls(value.dtype, tuple(value.shape), lambda: value)

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, DeferredTensor]) -> str:
    """Write a safetensors file and return its sha256 hex.

    Raises:
        OSError: The system refuses to write.
    """
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for piece in _pieces(tensors):
            digest.update(piece)
            stream.write(piece)
            del piece  # before the next tensor is computed
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, DeferredTensor]) -> str:
    """The sha256 hex of the file that `write_tensors` would write."""
    digest = hashlib.sha256()
    for piece in _pieces(tensors):
        digest.update(piece)
        del piece
    return digest.hexdigest()


def read_tensors(path: Path, expected_sha256: str, *, listed_in: str) -> dict[str, Tensor]:
    """Every tensor of a file, memory-mapped: pages are read on first access and stay outside the heap.

    Args:
        path: The file.
        expected_sha256: Its sha256 hex.
        listed_in: The file of the same directory that states the hash.

    Raises:
        ArtifactError: It is missing, damaged, or no safetensors file.
    """
    if path.exists():
        check_regular(path, home=path.parent)
    try:
        found = sha256_of(path)
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read ({err.strerror}); the artifact is incomplete. Make it again.") from err
    if found != expected_sha256:
        raise ArtifactError(
            f"{path} is damaged: its sha256 is {found[:12]}, {listed_in} states {expected_sha256[:12]}. Copy or make the artifact again."
        )
    return load_tensors(path)


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a file whose hash has been checked; on the CPU its pages are mapped.

    Raises:
        ArtifactError: It is not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  # not a dict
    except (safetensors.SafetensorError, ValueError, RuntimeError, OSError, KeyError, AttributeError) as err:
        raise ArtifactError(f"{path} is no safetensors file that torch can read ({first_line(err)}). Make it again.") from err


def tensor_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; without a copy where it is contiguous on the CPU."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers before Python 3.12


def _pieces(tensors: Mapping[str, DeferredTensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the file in order.

    Source: github.com/huggingface/safetensors, "Format": length of the header, header in JSON, data; wide types first, so that all tensors are aligned.
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


def _checked(name: str, stored: DeferredTensor) -> memoryview:
    value = stored.make()
    assert value.dtype == stored.dtype and tuple(value.shape) == stored.shape, name
    return tensor_bytes(value)


def check_params(params: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ArtifactError where a parameter is missing, has another shape than expected or is not finite."""
    for name, shape in expected.items():
        if name not in params:
            raise ArtifactError(f"parameter {name!r} is missing. Make the artifact again.")
        if tuple(params[name].shape) != shape:
            raise ArtifactError(
                f"parameter {name!r} has shape {list(params[name].shape)}, expected {list(shape)}. Make the artifact again."
            )
        if not bool(torch.isfinite(params[name]).all()):
            raise ArtifactError(f"parameter {name!r} holds NaN or infinity. Check the source model, then make the artifact again.")
    if unknown := sorted(set(params) - set(expected)):
        raise ArtifactError(f"parameter {unknown[0]!r} is not one of the model's. Make the artifact again.")

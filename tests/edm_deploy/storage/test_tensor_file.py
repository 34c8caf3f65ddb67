import weakref

import pytest
import torch
from safetensors.torch import load_file

from edm_deploy.storage.directories import sha256_of
from edm_deploy.storage.tensor_file import NAMES, DeferredTensor, digest_of, tensor_bytes, write_tensors


def some_of_each():
    return {str(dtype): torch.arange(-3, 3).reshape(2, 3).to(dtype) for dtype in NAMES} | {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }


def test_safetensors_itself_reads_what_was_written(tmp_path):
    tensors = some_of_each()
    write_tensors(tmp_path / "x", {name: DeferredTensor.of(value) for name, value in tensors.items()})
    found = load_file(tmp_path / "x")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_digest_is_that_of_the_file_written_or_not(tmp_path):
    stored = {name: DeferredTensor.of(value) for name, value in some_of_each().items()}
    assert write_tensors(tmp_path / "x", stored) == sha256_of(tmp_path / "x") == digest_of(stored)


def test_a_tensor_is_dropped_before_the_next_one_is_made(tmp_path):
    made = []

    def make():
        assert all(reference() is None for reference in made), "the one before is still in memory"
        value = torch.ones(4)
        made.append(weakref.ref(value))
        return value

    write_tensors(tmp_path / "x", {name: DeferredTensor(torch.float32, (4,), make) for name in "abc"})
    assert len(made) == 3


def test_the_order_of_the_names_does_not_change_the_digest():
    stored = {name: DeferredTensor.of(value) for name, value in some_of_each().items()}
    assert digest_of(stored) == digest_of(dict(reversed(stored.items())))


def test_bytes_in_memory_are_not_copied():
    value = torch.zeros(3, dtype=torch.int8)
    value_bytes = tensor_bytes(value)
    value[1] = 7
    assert bytes(value_bytes) == b"\x00\x07\x00"


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path):
    value = torch.arange(6.0).reshape(2, 3).t()
    write_tensors(tmp_path / "x", {"x": DeferredTensor.of(value)})
    assert torch.equal(load_file(tmp_path / "x")["x"], value)


def test_the_system_refusing_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_tensors(tmp_path / "nowhere" / "x", {})

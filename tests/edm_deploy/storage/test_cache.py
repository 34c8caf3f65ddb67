from __future__ import annotations

import json

import pytest

from edm_deploy.storage import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cached_assets_path", lambda *names: _made(tmp_path.joinpath(*names)))
    return tmp_path / "edm-deploy" / "kind" / "results"


def _made(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def result(calls, value=(1.0,), key="a"):
    def compute():
        calls.append(key)
        return list(value)

    return cache.cached_json("kind", {"key": key}, compute, valid=lambda found: isinstance(found, list))


def test_a_result_is_computed_once_for_each_key(folder):
    calls = []
    assert result(calls) == result(calls) == [1.0]
    assert result(calls, key="b", value=[2.0]) == [2.0]
    assert calls == ["a", "b"]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{", '{"a": 1}'])
def test_a_damaged_file_is_computed_again(folder, damage):
    calls = []
    result(calls)
    (path,) = folder.iterdir()
    path.write_text(damage)
    assert result(calls) == [1.0]
    assert calls == ["a", "a"]
    assert json.loads(path.read_text()) == [1.0]


def test_a_file_in_place_of_the_folder_costs_the_computation_only(tmp_path, monkeypatch):
    def corrupted(*names):
        raise ValueError("Corrupted assets folder")

    monkeypatch.setattr(cache, "cached_assets_path", corrupted)
    calls = []
    assert result(calls) == result(calls) == [1.0]
    assert calls == ["a", "a"]

"""The cache on a stand-in for a compiler, which counts. What a killed process leaves is tested with the kernels (tests/engines/kernels/test_build.py)."""

import pytest

from edm_deploy.native import code_cache
from edm_deploy.native.code_cache import SEAL, cache_directory, cached_code, digest_of, first_error


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compilations():
    """One entry for each time that the stand-in ran."""
    return []


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """Logged warnings."""
    logged: list[str] = []
    monkeypatch.setattr(code_cache.log, "warning", lambda message, *values: logged.append(message % values))
    return logged


def cached(compilations, name="a.so", code=b"compiled code"):
    return cached_code(name, lambda: compilations.append(name) or code)


def test_a_second_call_compiles_nothing(compilations, own_cache):
    assert cached(compilations) == cached(compilations) == (own_cache / "a.so", b"compiled code")
    assert compilations == ["a.so"]
    assert [path.name for path in own_cache.iterdir()] == ["a.so"]  # no temporary file is left


@pytest.mark.parametrize("damage", [b"", b"com", b"compiled cod3" + SEAL + bytes(32)], ids=["empty", "half", "altered"])
def test_a_damaged_entry_is_compiled_again_and_reported(compilations, damage, warnings):
    path, _ = cached(compilations)
    path.write_bytes(damage)
    assert cached(compilations)[1] == b"compiled code"
    assert cached(compilations)[1] == b"compiled code"
    assert len(compilations) == 2
    assert warnings == [f"{path} is damaged; the kernels are compiled again."]


def test_a_directory_that_cannot_be_written_is_reported_once(compilations, tmp_path, monkeypatch, warnings):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path / "file"))
    code_cache._fallback.cache_clear()
    first, second = cached(compilations)[0], cached(compilations, "b.so")[0]
    assert first.read_bytes().startswith(b"compiled code")
    assert first.parent == second.parent
    (warning,) = warnings
    assert warning.startswith(f"Compiled kernels cannot be kept in {tmp_path / 'file' / 'kernels'} (Not a directory)")
    assert "Set EDM_DEPLOY_CACHE to a directory that can be written" in warning


def test_the_cache_is_in_the_systems_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("EDM_DEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "edm-deploy" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory("tensorrt") == tmp_path / "home" / ".cache" / "edm-deploy" / "tensorrt"


def test_without_a_home_directory_a_process_has_its_own(monkeypatch, compilations, warnings):
    for name in ("EDM_DEPLOY_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    code_cache._fallback.cache_clear()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(code_cache.Path, "home", no_home)
    assert cached(compilations) == cached(compilations)
    assert compilations == ["a.so"]
    assert len(warnings) == 1
    assert "there is no home directory" in warnings[0]


def test_a_digest_stands_for_settings_names_and_content():
    digests = {
        digest_of(("-O3",), {"a": b"1", "b": b"2"}),
        digest_of(("-O2",), {"a": b"1", "b": b"2"}),
        digest_of(("-O3",), {"a": b"12", "b": b""}),
        digest_of(("-O3",), {"c": b"1", "b": b"2"}),
    }
    assert len(digests) == 4
    assert {len(each) for each in digests} == {32}


def test_the_first_error_of_a_compilers_output_is_found():
    assert first_error("a.cpp: In function f\n  a.cpp:1:2: error: no such thing\nmore") == "a.cpp:1:2: error: no such thing"
    assert first_error("  some words\n") == "some words"
    assert first_error("\0\n") == "it gave no reason"

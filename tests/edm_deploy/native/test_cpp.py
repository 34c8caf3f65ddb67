"""Compiling a small library for real, and what is said where there is no compiler."""

import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy.native import cpp
from edm_deploy.native.cpp import load_library, source_files

SMALL = {
    "twice.h": b"inline int twice(int x) { return 2 * x; }\n",
    "main.cpp": b'#include "twice.h"\nextern "C" int edm_twice(int x) { return twice(x); }\n',
}
FLAGS = ("-O0", "-fPIC", "-shared")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def load(files=SMALL, flags=FLAGS, target=cpp.TARGET):
    return load_library("small", files, "main.cpp", what="a test", remedy="; or do without", flags=flags, target=target)


def test_a_library_is_compiled_once_and_loaded(own_cache, monkeypatch):
    assert load().edm_twice(21) == 42
    assert [path.name.split("-")[0] for path in own_cache.iterdir()] == ["small"]
    monkeypatch.setattr(cpp, "_compiled", None)
    assert load().edm_twice(4) == 8


def test_source_flags_and_target_have_libraries_of_their_own(own_cache):
    load()
    load(SMALL | {"twice.h": b"inline int twice(int x) { return x + x; }\n"})
    load(flags=("-O1", *FLAGS[1:]))
    load(target="-march=x86-64")
    assert len(list(own_cache.iterdir())) == 4


def test_the_shared_headers_belong_to_the_source_unless_a_folder_has_its_own(tmp_path):
    (tmp_path / "main.cpp").write_text("// nothing")
    (tmp_path / "notes.txt").write_text("no source")
    assert set(source_files(tmp_path)) == {path.name for path in cpp.SHARED.glob("*.h")} | {"main.cpp"}
    (tmp_path / "simd.h").write_text("// another")
    assert source_files(tmp_path)["simd.h"] == b"// another"


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UnsupportedError,
        match=r"A C\+\+ compiler is needed for a test, and none is installed\. Install one.*apt install g\+\+.*; or do without\.",
    ):
        load()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UnsupportedError, match="CXX is '/nowhere/g\\+\\+', which is not there"):
        load()


def test_a_source_that_the_compiler_refuses_is_quoted(own_cache):
    with pytest.raises(UnsupportedError, match=r"g\+\+ refuses the source: main\.cpp:1:\d+: error: "):
        load(SMALL | {"main.cpp": b"int edm_twice(int x) { return nothing; }"})
    with pytest.raises(UnsupportedError, match=r"refuses the source: .*-march="):
        load(target="-march=nothing")
    assert not list(own_cache.rglob("*.so"))


def test_a_compiler_that_does_not_run_is_reported(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/nowhere/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UnsupportedError, match=r"and .*c\+\+ does not run: No such file or directory\. Install one"):
        load()


def test_a_library_that_cannot_be_loaded_is_reported_with_its_place(monkeypatch, own_cache):
    monkeypatch.setattr(cpp, "_compiled", lambda *args: b"no library")
    with pytest.raises(
        UnsupportedError,
        match=rf"^{own_cache}/small-\w+\.so, a test, cannot be loaded \(.*Set EDM_DEPLOY_CACHE to another directory; or do without\.$",
    ):
        load()

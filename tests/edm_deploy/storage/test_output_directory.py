"""Output directories are written whole, replaced only where they are ours, and refused before the work where they cannot be written."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy.storage import output_directory
from edm_deploy.storage.output_directory import DirectoryKind, check_output, entries, new_directory, replaces_contents

MARKER = "ours.json"
KIND = DirectoryKind("one of ours", MARKER, ("x", "[0-9].png"))
ENGINE = DirectoryKind("an engine", MARKER, kind="engine")
ROOT = Path(__file__).parents[3]


def write(path, text="new", kind=KIND, **files):
    with new_directory(path, kind=kind) as directory:
        (directory / MARKER).write_text(text)
        for name, content in files.items():
            (directory / name).write_text(content)


def test_a_directory_appears_only_when_the_block_ends_well(tmp_path):
    with new_directory(tmp_path / "a" / "b", kind=KIND) as directory:
        (directory / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_the_block_is_interrupted(tmp_path, error):
    def interrupted():
        with new_directory(tmp_path / "a", kind=KIND) as directory:
            (directory / "x").write_text("1")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_previous_result_is_replaced_and_kept_when_the_block_fails(tmp_path):
    for text in ("old", "new"):
        with new_directory(tmp_path / "a", kind=KIND) as directory:
            (directory / MARKER).write_text(text)
    assert (tmp_path / "a" / MARKER).read_text() == "new"
    with pytest.raises(RuntimeError), new_directory(tmp_path / "a", kind=KIND):
        raise RuntimeError
    assert (tmp_path / "a" / MARKER).read_text() == "new"


def test_a_file_at_the_target_is_reported(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ArtifactError, match="is a file; --out needs a directory"), new_directory(tmp_path / "a", kind=KIND):
        pass


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "a").mkdir()
    with new_directory(tmp_path / "a", kind=KIND) as directory:
        (directory / MARKER).write_text("")
    assert (tmp_path / "a" / MARKER).exists()


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Cannot write"), new_directory(tmp_path / "file" / "a", kind=KIND):
        pass


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_directory_with_files_of_the_user_is_never_replaced(tmp_path, overwrite):
    write(tmp_path / "a", "old", x="1")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    reason = "is one of ours with 1 other entries in it, such as 'notes.txt'" if overwrite else "exists and is not empty"
    for refused in (check_output, lambda path, **options: new_directory(path, **options).__enter__()):
        with pytest.raises(ArtifactError, match=reason):
            refused(tmp_path / "a", kind=KIND, overwrite=overwrite)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["a"]


def test_files_that_the_marker_lists_are_ours(tmp_path):
    write(tmp_path / "a", json.dumps({"kind": "engine", "files": {"deep/plan.bin": "0", "model.xml": "0"}}), kind=ENGINE)
    for name in ("deep", "model.xml"):
        (tmp_path / "a" / name).mkdir()
    check_output(tmp_path / "a", kind=ENGINE)
    (tmp_path / "a" / "other.xml").write_text("")
    with pytest.raises(ArtifactError, match=r"1 other entries in it, such as 'other\.xml'"):
        check_output(tmp_path / "a", kind=ENGINE)


def test_another_kind_with_the_same_marker_is_not_replaced(tmp_path):
    write(tmp_path / "a", '{"kind": "onnx"}', kind=ENGINE)
    with pytest.raises(ArtifactError, match=r"is not an engine \(ours\.json states kind 'onnx'\); nothing was written"):
        check_output(tmp_path / "a", kind=ENGINE)


@pytest.mark.parametrize("content", ["", "[]", '{"files": ["x"]}', '{"files": 3}', '{"kind": 3', "[" * 100_000])
def test_a_damaged_marker_lists_nothing(tmp_path, content):
    write(tmp_path / "a", content)
    check_output(tmp_path / "a", kind=KIND)


def test_the_check_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "deep" / "er" / "a", kind=KIND)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_directory_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in ("old", "new"):
        write(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / MARKER).read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file", "is a file"),
        ("file/a", "Cannot write"),
        ("broken", "is a link to .*nowhere, which does not exist"),
        ("loop", "is a link to .*loop, which does not exist"),
        ("n" * 300, "File name too long"),
        ("n" * 250, "File name too long"),
        ("/proc/self/a", "Cannot write"),
        ("/sys/a", "Cannot write"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, path, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ArtifactError, match=reason):
        check_output(tmp_path / path, kind=KIND)
    assert sorted(os.listdir(tmp_path)) == before


def test_too_little_space_is_refused_before_the_work(tmp_path):
    with pytest.raises(ArtifactError, match=r"Cannot write .*: (No space left on device|File too large)"):
        check_output(tmp_path / "a", kind=KIND, needed_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["mount", "cwd", "read-only parent"])
def fixed(request, tmp_path, monkeypatch):
    """A directory that cannot be renamed."""
    path = tmp_path / "fixed"
    path.mkdir()
    if request.param == "mount":
        monkeypatch.setattr(output_directory, "_is_mount_point", lambda target: target == path)
    elif request.param == "cwd":
        monkeypatch.chdir(path)
        path = Path(".")
    else:
        access = os.access
        monkeypatch.setattr(os, "access", lambda target, mode: Path(target) != tmp_path and access(target, mode))
    assert replaces_contents(path)
    return path


def test_the_contents_of_a_directory_that_cannot_be_renamed_are_replaced(fixed):
    (fixed / "lost+found").mkdir()
    inode = fixed.stat().st_ino
    check_output(fixed, kind=KIND)
    write(fixed, "old", x="1")
    assert entries(fixed) == [MARKER, "x"]
    write(fixed, "new")
    assert (entries(fixed), (fixed / MARKER).read_text()) == ([MARKER], "new")
    assert sorted(os.listdir(fixed)) == ["lost+found", MARKER]
    assert fixed.stat().st_ino == inode
    assert os.listdir(fixed.resolve().parent) == ["fixed"]


@pytest.mark.parametrize("at", range(5))
def test_a_replacement_of_contents_that_is_interrupted_is_undone_or_completed(fixed, monkeypatch, at):
    write(fixed, "old", x="old")
    rename, calls = Path.rename, []

    def stop(self, target):
        calls.append(self)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            write(fixed, "new", x="new")
    assert sorted(os.listdir(fixed)) == [MARKER, "x"]
    assert {(fixed / name).read_text() for name in (MARKER, "x")} in ({"old"}, {"new"})


@pytest.mark.parametrize("at", range(6))
def test_a_replacement_of_contents_that_was_killed_is_settled_by_the_next_run(tmp_path, at):
    script = """
import os, sys
from pathlib import Path
from edm_deploy.storage.output_directory import DirectoryKind, new_directory
os.chdir(sys.argv[1])
rename, calls = Path.rename, []
def stop(self, target):
    calls.append(self)
    if len(calls) == int(sys.argv[2]) + 1:
        os._exit(9)
    return rename(self, target)
Path.rename = stop
with new_directory(Path("."), kind=DirectoryKind("one of ours", "ours.json", ("x",))) as directory:
    for name in ("ours.json", "x"):
        (directory / name).write_text("new")
"""
    write(tmp_path, "old", x="old")
    killed = subprocess.run([sys.executable, "-c", script, tmp_path, str(at)], cwd=ROOT, check=False).returncode
    assert killed == (9 if at < 5 else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(RuntimeError), new_directory(Path("."), kind=KIND):
            raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == [MARKER, "x"]
    assert {(tmp_path / name).read_text() for name in (MARKER, "x")} == ({"old"} if at < 3 else {"new"})


def test_a_bind_mount_within_one_file_system_is_recognized(tmp_path, monkeypatch):
    line = f"36 35 98:0 /source {str(tmp_path / 'a b').replace(' ', chr(92) + '040')} rw - ext4 /dev/root rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert output_directory._is_mount_point(tmp_path / "a b")
    assert not output_directory._is_mount_point(tmp_path / "a")


def test_a_full_disk_ends_in_one_line_and_keeps_the_previous_result(tmp_path):
    write(tmp_path / "a", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(ArtifactError, match=r"Cannot write .*File too large"):
            write(tmp_path / "a", "new" * (1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a" / MARKER).read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]

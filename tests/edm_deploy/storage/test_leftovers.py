"""Runs that were killed leave nothing behind once the next one has run, and lose no result."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy.storage import leftovers
from edm_deploy.storage.leftovers import recover, remove_leftovers, reserve, scratch_directory
from edm_deploy.storage.output_directory import DirectoryKind, new_directory

MARKER = "ours.json"
KIND = DirectoryKind("one of ours", MARKER)
ROOT = Path(__file__).parents[3]
# A child that stops where it is told to, so that it can be killed there.
INSIDE = """
import sys, time
from pathlib import Path
from edm_deploy.storage.output_directory import DirectoryKind, new_directory
with new_directory(Path(sys.argv[1]), kind=DirectoryKind("one of ours", "ours.json")) as directory:
    (directory / "ours.json").write_text("half of the new one")
    print("here", flush=True)
    time.sleep(600)
"""
BETWEEN_RENAMES = """
import sys, time
from pathlib import Path
from edm_deploy.storage.output_directory import DirectoryKind, new_directory
rename = Path.rename
def stop(self, target):
    if Path(target) == Path(sys.argv[1]):
        print("here", flush=True)
        time.sleep(600)
    return rename(self, target)
Path.rename = stop
with new_directory(Path(sys.argv[1]), kind=DirectoryKind("one of ours", "ours.json")) as directory:
    (directory / "ours.json").write_text("new")
"""
SCRATCH = """
import time
from edm_deploy.storage.leftovers import scratch_directory
with scratch_directory("test") as directory:
    (directory / "x").write_text("1")
    print("here", flush=True)
    time.sleep(600)
"""


def child(script, *arguments, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | environment
    )
    assert process.stdout.readline() == b"here\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def write(path, text="new"):
    with new_directory(path, kind=KIND) as directory:
        (directory / MARKER).write_text(text)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def lines(monkeypatch):
    logged = []
    monkeypatch.setattr(leftovers.log, "warning", lambda text, *values: logged.append(text % values))
    return logged


def test_the_next_run_removes_what_a_killed_one_left_and_says_so(tmp_path, lines):
    write(tmp_path / "a", "old")
    kill(child(INSIDE, tmp_path / "a"))
    (left,) = [name for name in names(tmp_path) if name != "a" and not name.endswith(".lock")]
    write(tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert lines == [f"Removed {left} in {tmp_path}, left by an interrupted run."]


def test_a_live_run_keeps_its_directory(tmp_path, lines):
    process = child(INSIDE, tmp_path / "a")
    try:
        before = names(tmp_path)
        write(tmp_path / "a")
        assert names(tmp_path) == sorted([*before, "a"])
    finally:
        kill(process)
    assert lines == []


def test_the_previous_result_is_restored_where_the_run_was_killed_between_its_renames(tmp_path, lines):
    write(tmp_path / "a", "old")
    kill(child(BETWEEN_RENAMES, tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    recover(tmp_path / "a")
    assert (tmp_path / "a" / MARKER).read_text() == "old"
    assert names(tmp_path) == ["a"]
    assert lines[0] == f"Restored {tmp_path / 'a'}, which an interrupted run was replacing."


def test_the_previous_result_is_restored_where_the_rename_fails(tmp_path, monkeypatch):
    write(tmp_path / "a", "old")
    rename = Path.rename

    def fail(self, target):
        if Path(target) == tmp_path / "a" and self.suffix != ".old":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ArtifactError, match="Cannot write"):
        write(tmp_path / "a")
    assert (tmp_path / "a" / MARKER).read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_what_another_target_or_a_user_put_there_stays(tmp_path):
    others = [".a.backup12", ".a.0123abcd", ".a.b.0123abcd", ".a.b.0123abcd.lock", ".a.0123abcd.old"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".a.89abcdef.lock").symlink_to(tmp_path / ".a.0123abcd")
    write(tmp_path / "a")
    assert names(tmp_path) == sorted([*others, ".a.89abcdef.lock", "a"])


def test_a_scratch_directory_is_private_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_directory("test") as directory:
        assert directory.name.startswith("edm-deploy-test-")
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert names(tmp_path) == []


def test_the_next_scratch_directory_of_any_purpose_removes_dead_ones(tmp_path, monkeypatch, lines):
    kill(child(SCRATCH, TMPDIR=str(tmp_path)))
    assert len(names(tmp_path)) == 2
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_directory("other"):
        assert [name for name in names(tmp_path) if "edm-deploy-test-" in name] == []
    assert names(tmp_path) == []
    assert "left by an interrupted run" in lines[0]


def test_without_file_locks_nothing_is_removed(tmp_path, monkeypatch):
    kill(child(INSIDE, tmp_path / "a"))
    before = names(tmp_path)
    monkeypatch.setattr(leftovers, "fcntl", None)
    write(tmp_path / "a")
    assert names(tmp_path) == sorted([*before, "a"])


@pytest.mark.parametrize(("umask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_modes_follow_the_umask_whatever_a_library_chose(tmp_path, umask, file_mode, directory_mode):
    previous = os.umask(umask)
    try:
        with new_directory(tmp_path / "a", kind=KIND) as directory:
            (directory / MARKER).write_text("")
            (directory / "private").write_text("")
            (directory / "private").chmod(0o600)
            (directory / "sub").mkdir(mode=0o700)
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "a", *(tmp_path / "a").iterdir()]}
    assert modes == {"a": directory_mode, MARKER: file_mode, "private": file_mode, "sub": directory_mode}


def test_a_reservation_is_of_one_run_only(tmp_path):
    with reserve(tmp_path, ".a.") as first, reserve(tmp_path, ".a.") as second:
        assert first.directory != second.directory
        remove_leftovers(tmp_path, ".a.", target=tmp_path / "a")
        assert first.directory.is_dir() and second.directory.is_dir()
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_listed_is_left_alone(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    recover(tmp_path / "a")
    with scratch_directory("test") as directory:
        assert directory.is_dir()

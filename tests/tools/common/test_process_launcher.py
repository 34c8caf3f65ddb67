import os
import signal
import subprocess
import sys
import time

import pytest

from edm_deploy_tools.common import process_launcher
from edm_deploy_tools.common.process_launcher import launches, run_processes, threads_of_each
from edm_deploy_tools.common.run_app import CommandFailed

# Programs without torch: what a process of ours does is in its exit code and its file.


def by_rank(*programs: str) -> list[str]:
    """A command whose process of each rank runs another program."""
    return [sys.executable, "-c", f"import os; exec({programs!r}[int(os.environ['RANK'])])"]


def left(code: int, message: str) -> str:
    """A program that leaves a line of error and ends with an exit code."""
    return f"import os, sys; open(os.environ['EDM_DEPLOY_ERROR_FILE'], 'w').write({message!r}); sys.exit({code})"


def test_each_process_has_its_number_and_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    program = f"import os; open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(' '.join(os.environ[name] for name in {names}))"
    run_processes(2, [sys.executable, "-c", program])
    threads = threads_of_each(2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == [f"{rank} {rank} 2 2 127.0.0.1 {threads}" for rank in (0, 1)]
    assert threads_of_each(1) >= threads >= 1


@pytest.mark.parametrize(
    ("programs", "code", "reason"),
    [
        ((left(2, "batch is 3."), left(3, "This run lost a process.")), 2, "batch is 3."),
        ((left(3, "This run lost a process."), left(2, "Out of memory.")), 2, "Out of memory."),
        ((left(130, "Interrupted after step 2."), left(130, "Interrupted after step 2.")), 130, "Interrupted after step 2."),
        (
            (left(3, "The state is in x."), "import os; os.kill(os.getpid(), 9)"),
            2,
            "Process 1 of 2 was ended by SIGKILL. The state is in x.",
        ),
        (("pass", "import sys; sys.exit('bad luck')"), 1, "bad luck"),
        (("import sys; sys.exit(7)", "pass"), 7, "Process 0 of 2 ended with exit code 7."),
    ],
)
def test_the_first_reason_is_the_one_that_is_reported(programs, code, reason):
    with pytest.raises(CommandFailed) as failed:
        run_processes(2, by_rank(*programs))
    assert (failed.value.code, str(failed.value)) == (code, reason)


def test_a_process_that_does_not_notice_the_end_of_another_is_ended(monkeypatch):
    monkeypatch.setattr(process_launcher, "NOTICE", 0.3)
    monkeypatch.setattr(process_launcher, "GRACE", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    with pytest.raises(CommandFailed, match="Process 1 of 2 ended with exit code 4"):
        run_processes(2, by_rank(deaf, "import sys; sys.exit(4)"))


def test_a_signal_reaches_each_process_once(tmp_path):
    # A process of its own, whose signal handlers no other test has.
    counting = (
        "import os, signal, sys, time; seen = []; signal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
        f"open({str(tmp_path)!r} + '/ready' + os.environ['RANK'], 'w').close()\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(str(len(seen)))"
    )
    program = f"from edm_deploy_tools.common.process_launcher import run_processes; run_processes(2, {[sys.executable, '-c', counting]!r})"
    launcher = subprocess.Popen([sys.executable, "-c", program])
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait() == 0
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["1", "1"]


def test_processes_are_started_by_one_that_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [launches(None), launches(1), launches(2)] == [False, False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launches(2)
    assert (
        "torch"
        not in subprocess.run(
            [sys.executable, "-c", "import sys, edm_deploy_tools.common.process_launcher; print(*sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).stdout.split()
    )

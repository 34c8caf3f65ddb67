import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edm_deploy_tools.common.child_process import run_measured

HOLD = "import sys, time; held = bytearray(int(sys.argv[1])); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.4)"


def test_the_peak_includes_the_memory_of_the_command(tmp_path):
    measured = run_measured([sys.executable, "-c", HOLD, str(200 << 20)], cwd=tmp_path)
    assert measured.returncode == 0
    assert 200 << 20 < measured.peak_bytes < 300 << 20


def test_the_peak_counts_children(tmp_path):
    parent = f"import subprocess, sys; held = bytearray(100 << 20); held[::4096] = b'x' * len(held[::4096]); subprocess.run([sys.executable, '-c', {HOLD!r}, str(100 << 20)])"
    assert run_measured([sys.executable, "-c", parent], cwd=tmp_path).peak_bytes > 200 << 20


def test_a_failure_gives_its_code_and_last_line(tmp_path):
    measured = run_measured([sys.executable, "-c", "import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)"], cwd=tmp_path)
    assert (measured.returncode, measured.last_line) == (3, "two")


SLEEP = "import os, pathlib, time; pathlib.Path('pid.part').write_text(str(os.getpid())); os.rename('pid.part', 'pid'); time.sleep(60)"


# nohup ignores SIGHUP and a shell SIGINT for a background job; signals that are ignored stay so in child processes.
AS_IN_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)"


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("waited for 20 seconds")


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_command_ends_with_the_process_that_runs_it(tmp_path, number):
    if number is signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux can tell a process that its parent was killed")
    script = f"{AS_IN_A_TERMINAL}; from pathlib import Path; from edm_deploy_tools.common.child_process import run_measured; run_measured({[sys.executable, '-c', SLEEP]}, cwd=Path.cwd())"
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as parent:
        wait_until((tmp_path / "pid").exists)
        child = int((tmp_path / "pid").read_text())
        assert is_running(child)
        parent.send_signal(number)
        assert parent.wait(20) != 0
    wait_until(lambda: not is_running(child))


def test_a_signal_has_its_usual_effect_again_after_the_command(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    run_measured([sys.executable, "-c", ""], cwd=tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before

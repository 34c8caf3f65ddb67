import sys

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

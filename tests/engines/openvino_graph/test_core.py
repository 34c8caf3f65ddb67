import subprocess
import sys

import pytest

from engines.openvino_graph.core import core

ov = pytest.importorskip("openvino")

SIGNAL_AFTER_TWO_ENGINES = """
import signal, sys, tempfile, torch
from pathlib import Path
from tests.engines.test_openvino import small_session

sessions = [small_session(Path(tempfile.mkdtemp())) for _ in range(2)]
for session in sessions:
    session.run({"sample": torch.ones(1, 8, 4, 4), "timestep": torch.tensor([0.0])})
for session in sessions:
    session.close()
del session, sessions
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_a_process_has_one_core():
    assert core(ov) is core(ov)


def test_ctrl_c_after_two_engines_is_no_crash():
    """With a Core for each the signal had no stack to be handled on."""
    signals = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where SIGINT is ignored
    child = subprocess.run([sys.executable, "-c", signals + SIGNAL_AFTER_TWO_ENGINES], capture_output=True, text=True, check=False)
    assert child.returncode == 7, child.stderr[-500:]

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edm_deploy_tools.serving.bench.client import load, post


def test_the_client_imports_nothing_heavy():
    code = "import sys, edm_deploy_tools.serving.bench.client; print(*[m for m in ('torch', 'numpy', 'fastapi') if m in sys.modules])"
    root = Path(__file__).parents[4]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root)})
    assert ran.stdout.split() == []


def test_answers_are_counted_by_status(client):
    assert post(client.port, json.dumps({"steps": 1}).encode())[0] == 200
    assert set(load(client.port, 2, 0.1, 0, steps=(1, 2))) == {200}
    assert set(load(client.port, 1, 0.05, 0, steps=(1000, 1000))) == {400}

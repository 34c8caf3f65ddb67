import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi")

from edm_deploy_tools.serving.server import bound_socket

BAD = {
    "nothing": (["missing"], "missing does not exist; expected an engine directory"),
    "an artifact": (["{artifact}"], "is no engine directory: it has no manifest.json"),
    "slots": (["{engine}", "--slots", "9"], "9 slots: the engine in .* takes batches of 1 to 8. Pass --slots 8"),
    "names": (["{engine}", "{engine}"], "Two engines are named 'engine'"),
    "keys": (["{engine}", "--api-keys", "missing"], "--api-keys missing cannot be read"),
    "port": (["{engine}", "--port", "70000"], "Invalid value for '--port'"),
    "lora": (["{engine}", "--lora", "missing.safetensors"], "built without rank slots for adapters"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_served_is_one_line(run, chain, what):
    arguments, message = BAD[what]
    places = {"{engine}": chain.engine, "{artifact}": chain.artifact}
    ran = run("serve", *(places.get(argument, argument) for argument in arguments), *([] if "--port" in arguments else ["--port", 0]))
    assert re.search(message, ran.complaint), ran.err


def test_a_port_in_use_is_refused_before_an_engine_is_opened(run):
    with bound_socket("127.0.0.1", 0) as bound:
        ran = run("serve", "missing", "--port", bound.getsockname()[1])
    assert "Address already in use. Choose another --port" in ran.complaint


def test_a_missing_package_names_its_extra(run, chain, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    monkeypatch.delitem(__import__("sys").modules, "edm_deploy_tools.serving.app", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "edm_deploy_tools.serving.server", raising=False)
    assert (
        'needs the package fastapi, which is not installed. Install it with pip install "edm-deploy[serve]"'
        in run("serve", chain.engine).complaint
    )


def test_the_command_serves_until_sigterm_and_finishes_what_it_has_accepted(chain, tmp_path):
    with bound_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    answers = []

    def ask(path, fields=None):
        content = None if fields is None else json.dumps(fields).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", content, timeout=60) as answer:
            return json.load(answer)

    out, err = tmp_path / "out", tmp_path / "err"
    command = [sys.executable, "-m", "edm_deploy_tools", "serve", str(chain.engine), "--port", str(port), "--slots", "4"]
    with out.open("w") as stdout, err.open("w") as stderr, subprocess.Popen(command, stdout=stdout, stderr=stderr) as server:
        try:
            while not answers:
                assert server.poll() is None, err.read_text()
                try:
                    answers.append(ask("/health"))
                except urllib.error.URLError:
                    time.sleep(0.05)
            accepted = threading.Thread(target=lambda: answers.append(ask("/v1/images/generations", {"steps": 60, "n": 2, "seed": 1})))
            accepted.start()
            while ask("/health")["models"]["engine"]["running"] == 0:
                time.sleep(0.01)
            server.terminate()
            accepted.join()
            assert server.wait(60) == 0, err.read_text()
        finally:
            server.kill()
    assert f"Serving engine (4 slots) at http://127.0.0.1:{port}" in out.read_text()
    assert "Stopped." in out.read_text()
    assert answers[0]["status"] == "ok"
    assert len(answers[1]["data"]) == 2
    assert json.loads(err.read_text().splitlines()[0])["path"] == "/health"

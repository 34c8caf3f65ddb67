from __future__ import annotations

import socket
import sys

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "local", "--port", "0"), "--port 0: Ray Serve needs a port. Choose one"),
        (("--replicas", "2:1"), "--replicas 2:1: expected N or MIN:MAX"),
        (("--ray", "nowhere"), "--ray nowhere: expected local, auto, HOST:PORT"),
        (("--ray", "127.0.0.1:1"), "--ray 127.0.0.1:1 cannot be reached: Connection refused"),
    ],
)
def test_what_cannot_be_deployed_is_one_line(run, chain, options, message):
    pytest.importorskip("ray")
    assert message in run("serve", chain.engine, *options).complaint


def test_a_port_in_use_is_found_before_a_cluster_is_started(run, chain):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as other:
        ran = run("serve", chain.engine, "--ray", "local", "--port", other.getsockname()[1])
    assert "Address already in use. Choose another --port" in ran.complaint


def test_ray_that_is_not_installed_is_named_with_its_extra(run, chain, monkeypatch):
    for name in ("ray_app", "ray_engines", "ray_service"):
        monkeypatch.delitem(sys.modules, f"edm_deploy_tools.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'Install it with pip install "edm-deploy[ray]"' in run("serve", chain.engine, "--replicas", "2").complaint

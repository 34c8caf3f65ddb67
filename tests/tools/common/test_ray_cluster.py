from __future__ import annotations

import socket
import sys

import pytest

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy_tools.common.ray_cluster import check_address, cluster


@pytest.mark.parametrize("address", ["somewhere", "10.0.0.1:", ":6379", "host:port"])
def test_an_address_without_a_port_is_refused(address):
    with pytest.raises(InputError, match=f"--ray {address}: expected local, auto, HOST:PORT"):
        check_address(address)


def test_an_address_where_nothing_listens_is_refused_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            UnsupportedError, match=f"--ray {address} cannot be reached: Connection refused. Start it with `ray start --head`"
        ):
            check_address(address)


def test_ray_that_is_not_installed_is_named_with_its_extra(run, chain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = run("generate", chain.engine, "--num-images", 2, "--out", tmp_path / "out", "--workers", 2)
    assert 'needs the package ray, which is not installed. Install it with pip install "edm-deploy[ray]"' in ran.complaint


@pytest.mark.extended
def test_something_else_that_listens_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UnsupportedError, match=f"--ray {address} cannot be reached") as refused, cluster(address, cpus=1):
            pass
    assert "\n" not in str(refused.value)

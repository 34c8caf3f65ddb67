import shutil
from pathlib import Path

import pytest

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits
from edm_deploy_tools.serving.server import bound_socket, named_directories, open_replicas


def test_a_port_in_use_is_refused():
    with bound_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=rf"cannot use 127\.0\.0\.1:{port}: Address already in use\. Choose another --port"):
            bound_socket("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.1", "no host"])
def test_an_address_of_another_machine_is_refused(host):
    with pytest.raises(InputError, match=f"The server cannot use {host}:8000: .* Choose another --port or --host"):
        bound_socket(host, 8000)


def test_engines_are_named_by_their_directory_or_by_the_user(tmp_path):
    assert named_directories(["a/b", "c=d/e=f"]) == {"b": Path("a/b"), "c": Path("d/e=f")}
    with pytest.raises(InputError, match=r"Two engines are named 'b': a/b and c/b\. Name one as NAME=DIR"):
        named_directories(["a/b", "c/b"])


def test_no_engine_stays_open_where_one_cannot_be_opened(chain, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(ServedModel, "close", lambda self: closed.append(self.card.name))
    with pytest.raises(ArtifactError, match="does not exist"):
        open_replicas({"first": chain.engine, "second": tmp_path / "missing"}, Limits())
    assert "first" in closed


def test_an_opened_engine_has_been_called_once(chain, tmp_path):
    replicas = open_replicas({"tiny": shutil.copytree(chain.engine, tmp_path / "engine")}, Limits(queue=3), slots=2)
    assert replicas["tiny"].model.card.slots == 2
    assert replicas["tiny"].limits.queue == 3
    replicas["tiny"].close()

"""One replica of a tiny engine for all tests of the HTTP application that do not end it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica
from tests.tools.serving.http_client import Client, serving


@pytest.fixture(scope="session")
def replica(chain) -> Iterator[Replica]:
    opened = Replica(ServedModel(chain.engine, name="tiny", slots=4), Limits(queue=8))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def client(replica) -> Iterator[Client]:
    with serving({"tiny": replica}) as served:
        yield served

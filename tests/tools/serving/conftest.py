"""One tiny model for all tests of the HTTP application: a server of it that is shared, and replicas that a test may drain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica
from tests.tools.serving.http_client import Client, serving


@pytest.fixture(scope="session")
def served_model(chain) -> Iterator[ServedModel]:
    opened = ServedModel(chain.engine, name="tiny", slots=4)
    yield opened
    opened.close()


@pytest.fixture
def replica(served_model, monkeypatch) -> Iterator[Replica]:
    """A replica of this test; the model stays open."""
    monkeypatch.setattr(served_model, "close", lambda: None)
    opened = Replica(served_model, Limits(queue=8))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def client(served_model) -> Iterator[Client]:
    replica = Replica(served_model, Limits(queue=8))
    with serving({"tiny": replica}) as served:
        yield served

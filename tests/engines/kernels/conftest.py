"""A GPU without a GPU: launches of the kernels go to the emulator."""

import pytest

from engines.kernels import driver
from tests.engines.kernels.emulator import Emulator


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that were launched, on the emulator of a GPU with 20 multiprocessors."""
    entries: list[str] = []
    emulator = Emulator.built()

    def launch(launches, device) -> None:
        for one in launches:
            entries.append(one.entry)
            emulator.run(one.entry, one.params, one.grid, one.threads, one.shared_bytes)

    monkeypatch.setattr(driver, "launch", launch)
    monkeypatch.setattr(driver, "multiprocessors", lambda device: 20)
    return entries

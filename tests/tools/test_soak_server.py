from __future__ import annotations

import pytest

from edm_deploy_tools import soak_server

pytestmark = pytest.mark.extended


@pytest.mark.parametrize("more", [(), ("--replicas", "2", "--kill-every", "5", "--max-growth-mb", "1000")])
def test_a_soak_of_the_command_serve_loses_nothing(chain, capfd, more):
    small = ("--requests", "200", "--connections", "6", "--slots", "4", "--port", "18765", "--cancelled", "0.1", "--malformed", "0.1")
    assert soak_server.main([str(chain.engine), *small, *more]) == 0, capfd.readouterr().out
    assert "lost" in capfd.readouterr().out


def test_a_server_that_cannot_start_is_one_line(tmp_path, capfd):
    assert soak_server.main([str(tmp_path), "--requests", "1", "--port", "18766"]) == 2
    errors = capfd.readouterr().err
    assert "serve ended with exit code 2: Error: " in errors
    assert "is no engine directory" in errors

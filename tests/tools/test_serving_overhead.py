import re

import pytest

from edm_deploy_tools.common import run_app
from edm_deploy_tools.serving_overhead import Round, app


def test_the_loop_is_compared_with_bare_calls_in_turns(chain, capsys):
    assert run_app.run(app, "x", [str(chain.engine), "--slots", "4", "--rounds", "2", "--calls", "10"]) == 0
    found = re.search(
        r"4 slots, 2 rounds of 10 calls: bare ([\d.]+) ms, served ([\d.]+) ms .* occupancy ([\d.]+)%", capsys.readouterr().out
    )
    assert found and float(found[1]) > 0 and float(found[2]) > 0
    assert float(found[3]) > 90


def test_overhead_is_a_share_of_the_bare_call():
    assert Round(0.1, 0.108, 1.0).overhead == pytest.approx(0.08)

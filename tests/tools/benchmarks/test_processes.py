import sys

import pytest

from edm_deploy_tools.benchmarks.processes import app, steps_per_second
from edm_deploy_tools.common.run_app import CommandFailed, run


def test_the_rate_is_that_of_the_last_line_of_progress():
    program = "import os, sys; sys.stderr.write('calibrate 4/4 3.00/s\\nfinetune 1/9 loss 1.2, 0.50/s\\nfinetune 9/9 loss 1.2e-05, ' + os.environ['OMP_NUM_THREADS'] + '.25/s\\n')"
    assert steps_per_second([sys.executable, "-c", program], 2) == 2.25


def test_a_run_that_fails_is_reported_with_its_line():
    with pytest.raises(CommandFailed, match="Error: no such model"):
        steps_per_second([sys.executable, "-c", "import sys; sys.exit('Error: no such model')"], 1)


@pytest.mark.extended
def test_both_kinds_are_timed_in_turns(chain, capsys):
    assert run(app, "bench", [str(chain.model), "--steps", "4", "--repeats", "1"]) == 0
    assert "times the steps per second of one process" in capsys.readouterr().out

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn

from edm_deploy.errors import InputError
from engines.from_artifact.recorded_session import RECORDED_SHAPES, RecordedSession

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="no C++ compiler")
CPU = torch.device("cpu")


class Sums(nn.Module):
    """An output of another layout than the input's, and one that is small."""

    def forward(self, x, y):
        summed = torch.ops.aten.add.Tensor(torch.ops.aten.permute.default(x, [0, 2, 3, 1]), y)
        return (summed, torch.ops.aten.mul.Tensor(y, 2))


def session(**options) -> RecordedSession:
    return RecordedSession(fx.symbolic_trace(Sums()), ["x", "y"], ["sum", "double"], CPU, threads=1, **options)


def x_of(batch: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((batch, 3, 4, 4), value)


def test_outputs_are_named_contiguous_and_outlive_the_next_run():
    opened, y = session(), torch.arange(3.0)
    first = opened.run({"y": y, "x": x_of(2)})
    assert first["sum"].is_contiguous()
    assert torch.equal(first["sum"], x_of(2).permute(0, 2, 3, 1) + y)
    again = opened.run({"y": y, "x": x_of(2, 7.0)})
    assert torch.equal(again["sum"], x_of(2, 7.0).permute(0, 2, 3, 1) + y)
    assert torch.equal(first["sum"], x_of(2).permute(0, 2, 3, 1) + y), "a run must not change what was returned before"


def test_shapes_are_recorded_once_and_the_least_recently_used_makes_room():
    opened, y = session(), torch.ones(3)
    opened.run({"x": x_of(1), "y": y})
    first = next(iter(opened._recorded.values()))
    for batch in range(2, RECORDED_SHAPES + 1):
        opened.run({"x": x_of(batch), "y": y})
    opened.run({"x": x_of(1), "y": y})  # used again: batch 2 is the oldest now
    opened.run({"x": x_of(RECORDED_SHAPES + 1), "y": y})
    assert len(opened._recorded) == RECORDED_SHAPES
    assert first in opened._recorded.values()
    assert [key[0][0] for key in opened._recorded] == [*range(3, RECORDED_SHAPES + 1), 1, RECORDED_SHAPES + 1]


def test_kept_inputs_are_copied_when_another_tensor_is_passed_and_serve_every_shape():
    opened = session(kept=frozenset({"y"}))
    for y in (torch.ones(3), torch.full((3,), 5.0), torch.ones(3)):
        for batch in (1, 2, 1):
            found = opened.run({"x": x_of(batch), "y": y})
            assert torch.equal(found["sum"], x_of(batch).permute(0, 2, 3, 1) + y)
            assert torch.equal(found["double"], 2 * y)


def test_it_runs_in_every_autograd_mode_of_the_caller_and_returns_ordinary_tensors():
    opened, y = session(kept=frozenset({"y"})), torch.ones(3)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            x = x_of(2).requires_grad_(mode is torch.enable_grad)
            found = opened.run({"x": x, "y": torch.ones(3) if mode is torch.no_grad else y})
        assert not found["sum"].is_inference()
        assert not found["sum"].requires_grad
        assert torch.equal(found["sum"], x_of(2).permute(0, 2, 3, 1) + 1)


def test_two_threads_on_one_recording_each_get_their_own_result():
    opened, start, y = session(), threading.Barrier(2), torch.zeros(3)

    def hammer(first):
        start.wait()
        return [opened.run({"x": x_of(2, float(value)), "y": y})["sum"].unique().tolist() for value in range(first, first + 50)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(hammer, (0, 100)))
    assert results == [[[float(value)] for value in range(first, first + 50)] for first in (0, 100)]


def test_closing_drops_recordings_weights_and_graph():
    opened = session(kept=frozenset({"y"}))
    opened.run({"x": x_of(1), "y": torch.ones(3)})
    opened.close()
    assert (len(opened._recorded), opened._module, opened._weights, opened._kept.get("y")) == (0, None, None, None)
    with pytest.raises(InputError, match="has been closed"):
        opened.run({"x": x_of(1), "y": torch.ones(3)})


def test_a_forked_process_is_told_to_spawn(tmp_path):
    """OpenMP's threads do not survive a fork: without the check the child would wait for them for ever."""
    code = (
        "import os, torch\n"
        "from torch import fx\n"
        "from engines.from_artifact.recorded_session import RecordedSession\n"
        "class Twice(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return (x * 2,)\n"
        "module = torch.export.export(Twice(), (torch.zeros(3),), strict=False).module(check_guards=False)\n"
        "session = RecordedSession(module, ['x'], ['y'], torch.device('cpu'), threads=2)\n"
        "assert session.run({'x': torch.ones(3)})['y'].tolist() == [2.0] * 3\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        session.run({'x': torch.ones(3)})\n"
        "    except Exception as err:\n"
        "        os._exit(7 if 'Start workers by spawn' in str(err) else 1)\n"
        "    os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == ["7"]

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy_tools.benchmarks.engines import Bench, Timing, bench_engines, engine_calls, in_turns, unused


def test_contestants_take_turns():
    order: list[str] = []
    timings = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order[-6:] == ["a", "b"] * 3
    assert [len(timing.seconds) for timing in timings] == [3, 3]


def test_ratios_are_relative_to_the_first():
    bench = Bench(conditions={}, timings=(Timing(name="torch", seconds=(0.2, 0.4, 0.3)), Timing(name="x", seconds=(0.1,))), batch=6)
    first, second = bench.rows()
    assert (first["median ms"], first["samples/s"], first["times torch"]) == (300.0, 20.0, 1.0)
    assert second["times torch"] == 3.0


def test_an_engine_is_timed_beside_float_baselines(chain):
    pytest.importorskip("openvino", reason="the float baseline of OpenVINO needs openvino")
    bench = bench_engines([chain.engine], against=["torch", "torch-bf16", "openvino-fp32"], batch=2, rounds=2)
    assert [timing.name for timing in bench.timings] == ["torch", "torch-bf16", "openvino-fp32", "engine"]
    assert {"cpu", "batch", "rounds", "threads", "date", "torch"} <= set(bench.conditions)


def test_an_unknown_baseline_names_the_nearest(chain):
    with pytest.raises(UnsupportedError, match="Did you mean 'torch'"):
        bench_engines([chain.engine], against=["torc"])


def test_no_engine_is_refused():
    with pytest.raises(InputError, match="No engine was given"):
        bench_engines([])


def test_equal_names_are_told_apart():
    assert unused("engine", {"engine": 1}) == "engine 2"


def test_an_engine_with_relaxed_timesteps_is_two_contestants_each_at_its_own(monkeypatch):
    seen = []

    class Denoiser:
        device = torch.device("cpu")
        manifest = SimpleNamespace(engine_of_timestep=mask_from_intervals([(0, 199)], 1000))

        def __call__(self, sample, timestep):
            seen.append(timestep.tolist())

    monkeypatch.setattr("edm_deploy_tools.benchmarks.engines.load_denoiser", lambda path, device: Denoiser())
    calls = engine_calls(Path("engine"), {"sample": torch.zeros(3, 1), "timestep": torch.zeros(3)}, None)
    for call in calls.values():
        call()
    assert list(calls) == ["", " relaxed"]
    assert seen == [[200.0, 600.0, 999.0], [0.0, 100.0, 199.0]]

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.storage.directories import sha256_of
from edm_deploy_tools.benchmarks.engines import Bench, Timing, alternate, bench_engines, engine_calls, unused


def test_calls_alternate():
    order: list[str] = []
    timings = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order[-6:] == ["a", "b"] * 3
    assert [len(timing.seconds) for timing in timings] == [3, 3]


def test_ratios_are_relative_to_the_first():
    bench = Bench(conditions={}, timings=(Timing(name="torch", seconds=(0.2, 0.4, 0.3)), Timing(name="x", seconds=(0.1,))), batch=6)
    first, second = bench.rows()
    assert (first["median ms"], first["samples/s"], first["times torch"]) == (300.0, 20.0, 1.0)
    assert second["times torch"] == 3.0


def test_an_engine_is_timed_with_float_baselines(chain):
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


def edited(engine, change):
    """A copy of an engine with an edited manifest."""
    manifest = json.loads((engine / "manifest.json").read_text())
    change(manifest)
    (engine / "manifest.json").write_text(json.dumps(manifest))
    return engine


def test_an_engine_that_cannot_run_here_is_skipped_with_its_reason(run, chain, copy_of):
    other = copy_of(chain.engine)
    (other / "engine.trt").write_bytes(b"")
    files = {"engine.trt": sha256_of(other / "engine.trt")}
    edited(other, lambda manifest: manifest.update(backend="trt-rtx", files=manifest["files"] | files))
    ran = run("bench", other, chain.engine, "--batch", 2, "--rounds", 1)
    assert ran.code == 0, ran.err
    assert ran.err.startswith(f"Note: {other} is skipped: ")
    assert "engine" in ran.out
    content = json.loads(run("bench", other, chain.engine, "--batch", 2, "--rounds", 1, "--json").out)
    assert [row["name"] for row in content["results"]] == ["torch", "engine"]
    assert list(content["skipped"]) == [str(other)]


def test_no_engine_that_can_run_here_is_an_error(run, chain, copy_of):
    other = copy_of(chain.engine)
    (other / "engine.trt").write_bytes(b"")
    files = {"engine.trt": sha256_of(other / "engine.trt")}
    edited(other, lambda manifest: manifest.update(backend="trt-rtx", files=manifest["files"] | files))
    assert run("bench", other, "--batch", 2, "--rounds", 1).complaint


def test_a_training_step_is_measured_without_engines(run, chain):
    assert "without engines" in run("bench", chain.engine, "--finetune-step", chain.model).complaint
    assert "without engines" in run("bench", "--finetune-step", chain.model, "--device", "cpu").complaint


def test_equal_names_get_numbers():
    assert unused("engine", {"engine": 1}) == "engine 2"


def test_an_engine_with_float_timesteps_is_timed_at_timesteps_of_each_graph():
    timesteps = []

    class Denoiser:
        device = torch.device("cpu")
        manifest = SimpleNamespace(engine_of_timestep=mask_from_intervals([(0, 199)], 1000))

        def __call__(self, sample, timestep):
            timesteps.append(timestep.tolist())

    calls = engine_calls(Denoiser(), {"sample": torch.zeros(3, 1), "timestep": torch.zeros(3)})
    for call in calls.values():
        call()
    assert list(calls) == ["", " relaxed"]
    assert timesteps == [[200.0, 600.0, 999.0], [0.0, 100.0, 199.0]]

"""A run of seconds on the tiny engine; and engines that compute wrongly, fail, accept anything or grow are noticed."""

import json
import math
import random
import time

import pytest
import torch

from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.graph_inputs import InputChecks
from edm_deploy_tools import soak
from edm_deploy_tools.benchmarks.soak_calls import SHAPES, soaked_engine
from edm_deploy_tools.soak import Soak, main

SECONDS = 0.01  # each reading of the memory makes the calls


@pytest.fixture(autouse=True)
def fewer_readings(monkeypatch):
    monkeypatch.setattr(soak, "READINGS", 3)


@pytest.fixture
def engine(chain):
    return soaked_engine(chain.engine, seed=0)


def soaked(engine, threads=2):
    """Figures of a short run."""
    run = Soak([engine], threads=threads, seed=0)
    run.run(SECONDS)
    return run.figures


def test_a_run_reports_calls_refusals_and_memory(chain, tmp_path, capsys):
    assert main([str(chain.engine), "--minutes", "0.01", "--max-growth-mb", "1000", "--json", str(tmp_path / "soak.json")]) == 0
    report = json.loads((tmp_path / "soak.json").read_text())
    figures = report["figures"]
    assert figures["calls"] >= soak.READINGS * SHAPES
    assert figures["refused calls"] > 0
    assert (figures["wrong results"], figures["unexpected errors"]) == (0, 0)
    assert len(report["MB"]) == soak.READINGS
    assert figures["growth MB"] == pytest.approx(report["MB"][-1] - report["MB"][0], abs=0.2)
    assert report["by engine"][str(chain.engine)]["calls"] == figures["calls"]
    assert "calls per second" in capsys.readouterr().out


def test_a_result_that_differs_by_little_is_wrong(engine, monkeypatch):
    exact = EngineDenoiser.run
    monkeypatch.setattr(EngineDenoiser, "run", lambda self, inputs: exact(self, inputs) * (1 + 2**-20))
    figures = soaked(engine)
    assert figures.total("wrong") > 0
    assert "differs by" in figures.messages[0]
    assert figures.failed(max_growth_mb=1000)


def test_a_result_that_a_later_call_overwrites_is_wrong(engine, monkeypatch):
    run, exact, results = Soak([engine], threads=1, seed=0), EngineDenoiser.run, []

    def overwriting(self, inputs):
        if results:
            results[-1].zero_()
        results.append(exact(self, inputs))
        if len(results) == 5:
            run._stopped.set()
        return results[-1]

    monkeypatch.setattr(EngineDenoiser, "run", overwriting)
    run._work(random.Random(0), until=math.inf)
    assert (run.figures.total("calls"), run.figures.total("wrong")) == (5, 4)


def test_other_exceptions_are_unexpected_errors(engine, monkeypatch):
    def run(self, inputs):
        raise RuntimeError("Infer Request is busy")

    monkeypatch.setattr(EngineDenoiser, "run", run)
    figures = soaked(engine)
    assert figures.total("calls") == figures.total("wrong") == 0
    assert figures.messages[0].endswith("RuntimeError: Infer Request is busy")
    assert figures.failed(max_growth_mb=1000)


def test_a_malformed_call_that_returns_is_an_unexpected_error(engine, monkeypatch):
    monkeypatch.setattr(InputChecks, "_timesteps", lambda self, value, batch: torch.zeros(batch))
    run = Soak([engine], threads=1, seed=0)
    run._refused(engine, "a timestep of NaN")
    assert run.figures.messages == [f"{engine.name}: a timestep of NaN was not refused"]


def test_memory_that_grows_fails_the_run(chain, monkeypatch, capsys):
    grown = iter((100, 105, 109))
    monkeypatch.setattr(soak, "resident_bytes", lambda: next(grown) * 3_000_000)
    assert main([str(chain.engine), "--minutes", "0.01"]) == 1
    assert "27.0" in capsys.readouterr().out


def test_ctrl_c_ends_early_with_the_figures(chain, monkeypatch, tmp_path, capsys):
    began = time.monotonic()

    def interrupted(working, timeout):
        if time.monotonic() - began > 0.5:
            raise KeyboardInterrupt
        time.sleep(0.1)
        return set(), working

    monkeypatch.setattr(soak, "wait", interrupted)
    monkeypatch.setattr(soak, "resident_bytes", lambda: 10**8)
    assert main([str(chain.engine), "--minutes", "60", "--json", str(tmp_path / "soak.json")]) == 130
    assert time.monotonic() - began < 60
    assert json.loads((tmp_path / "soak.json").read_text())["figures"]["calls"] >= SHAPES
    assert capsys.readouterr().err == "Error: Interrupted.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'engines'"),
        (["nowhere"], "nowhere"),
        (["{engine}", "--minutes", "0"], "--minutes"),
        (["{engine}", "--json", "{engine}"], "Is a directory"),
    ],
)
def test_errors_are_one_line(chain, arguments, message, capsys):
    assert main([argument.format(engine=chain.engine) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert message in error

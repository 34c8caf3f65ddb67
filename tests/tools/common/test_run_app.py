from __future__ import annotations

import logging
import subprocess
import sys

import diffusers
import pytest
import transformers
import typer

from calibration.run.options import Interrupted
from edm_deploy.errors import InputError
from edm_deploy_tools.common.run_app import app_with, run


def app_that(raises: BaseException | None) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command()
    def command() -> None:
        if raises:
            raise raises

    return app


def test_a_command_that_ends_well_gives_zero():
    assert run(app_that(None), "x", []) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("rows is 0;\nexpected 1."), "Error: rows is 0; expected 1."),
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device"),
        (MemoryError(), "Out of memory"),
        (KeyError("x"), "a fault of edm-deploy"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 'pip install "edm-deploy[tools]"'),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(capsys, error, message):
    assert run(app_that(error), "x", []) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("Interrupted after step 3.")])
def test_an_interruption_is_one_line_and_exit_code_130(capsys, error):
    assert run(app_that(error), "x", []) == 130
    err = capsys.readouterr().err
    assert err.startswith("Error: Interrupted")
    assert err.count("\n") == 1


def test_a_stdout_that_was_closed_ends_without_a_message():
    code = "import sys; from tests.tools.common.test_run_app import app_that_prints; from edm_deploy_tools.common.run_app import run; "
    code += "sys.exit(run(app_that_prints(), 'x', []))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "line 0\n"
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def app_that_prints() -> typer.Typer:
    app = app_with()

    @app.command()
    def command() -> None:
        for number in range(100_000):
            sys.stdout.write(f"line {number}\n")

    return app


def test_the_environment_variable_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("EDM_DEPLOY_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run(app_that(KeyError("x")), "x", [])


def test_a_wrong_option_is_one_line_and_exit_code_2(capsys):
    assert run(app_that(None), "x", ["--nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "sentence"), [("No such x. Did you mean 'y'?", "No such x. Did you mean 'y'?"), ("No x", "No x."), ("No x.", "No x.")]
)
def test_a_usage_error_has_one_final_punctuation(capsys, message, sentence):
    assert run(app_that(typer.BadParameter(message)), "x", []) == 2
    assert capsys.readouterr().err == f"Error: Invalid value: {sentence} `x --help` shows how.\n"


def test_a_short_option_shows_the_help_too(capsys):
    assert run(app_with(), "x", []) == 2
    assert run(app_that_prints(), "x", ["-h"]) == 0
    assert "Usage: x" in capsys.readouterr().out


def app_that_warns(*names: str) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command()
    def command() -> None:
        for name in names:
            logging.getLogger(name).warning("random weights")
            logging.getLogger(name).info("by the way")

    return app


def test_a_warning_of_ours_is_one_line_and_shown_once(capsys):
    assert (
        run(app_that_warns("edm_deploy.pipelines.prompt_encoding", "calibration.x", "edm_deploy.pipelines.prompt_encoding"), "x", []) == 0
    )
    assert capsys.readouterr().err == "Note: random weights\n"
    assert run(app_that_warns("edm_deploy.pipelines.prompt_encoding"), "x", []) == 0
    assert capsys.readouterr().err == "Note: random weights\n", "another command shows it again"


@pytest.mark.parametrize("library", [diffusers, transformers])
def test_a_warning_of_a_library_is_not_shown(capsys, library):
    library.utils.logging.set_verbosity_warning()  # as after an import before the command
    assert run(app_that_warns(f"{library.__name__}.models", "some.library"), "x", []) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]
)
def test_an_error_without_memory_names_the_option_that_saves_it(capsys, error):
    assert run(app_that(error), "x", []) == 2
    assert "--low-memory" in capsys.readouterr().err

from __future__ import annotations

import logging

import diffusers
import pytest
import transformers
import typer

from edm_deploy.errors import InputError
from edm_deploy_tools.common.run_app import run


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
    ("error", "said"),
    [
        (InputError("rows is 0;\nexpected 1."), "Error: rows is 0; expected 1."),
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device"),
        (MemoryError(), "Out of memory"),
        (KeyError("x"), "a fault of edm-deploy"),
        (KeyboardInterrupt(), "Interrupted"),
    ],
)
def test_an_error_is_one_line_and_two(capsys, error, said):
    assert run(app_that(error), "x", []) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_the_traceback_comes_when_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("EDM_DEPLOY_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run(app_that(KeyError("x")), "x", [])


def test_a_wrong_option_is_one_line_and_two(capsys):
    assert run(app_that(None), "x", ["--nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def app_that_warns(*names: str) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command()
    def command() -> None:
        for name in names:
            logging.getLogger(name).warning("drawn at random")
            logging.getLogger(name).info("by the way")

    return app


def test_a_warning_of_ours_is_a_line_and_comes_once(capsys):
    assert (
        run(app_that_warns("edm_deploy.pipelines.prompt_encoding", "calibration.x", "edm_deploy.pipelines.prompt_encoding"), "x", []) == 0
    )
    assert capsys.readouterr().err == "Note: drawn at random\n"
    assert run(app_that_warns("edm_deploy.pipelines.prompt_encoding"), "x", []) == 0
    assert capsys.readouterr().err == "Note: drawn at random\n", "another command says it again"


@pytest.mark.parametrize("library", [diffusers, transformers])
def test_a_librarys_warning_is_not_shown(capsys, library):
    library.utils.logging.set_verbosity_warning()  # as a library is that was imported before the command ran
    assert run(app_that_warns(f"{library.__name__}.models", "some.library"), "x", []) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]
)
def test_without_memory_the_option_that_saves_it_is_named(capsys, error):
    assert run(app_that(error), "x", []) == 2
    assert "--low-memory" in capsys.readouterr().err

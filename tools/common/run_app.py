"""Run a command line: a user error ends in one line on stderr and exit code 2, and libraries' messages are suppressed."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from edm_deploy_tools.common.extras import missing_package

TRACEBACK_VARIABLE = "EDM_DEPLOY_TRACEBACK"  # if set, an unexpected error shows its traceback
ERROR_FILE = (
    "EDM_DEPLOY_ERROR_FILE"  # if set, the line of error goes to this file: `process_launcher` reports one for all processes of a run
)
USER_ERROR = 2
PROCESS_LOST = 3  # another process of the run has ended: that one has the reason
INTERRUPTED = 130  # the shell's code for Ctrl-C, 128 + SIGINT; typer returns it outside its standalone mode
CLOSED_STDOUT = 1  # as click and rich exit when the reader of a pipe has gone
NO_MEMORY = ("can't allocate memory", "CUDA out of memory")  # in torch's RuntimeError and OutOfMemoryError
OURS = ("edm_deploy", "calibration", "engines", "edm_deploy_tools")  # packages whose warnings are shown
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
}


class CommandFailed(Exception):  # noqa: N818  # no error of this process
    """What a command started has failed, with this exit code and for this reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def app_with(**settings: Any) -> typer.Typer:
    """A typer app with the settings that all commands share: `-h` as well as `--help`, no completion unless set, plain tracebacks."""
    help_names = {"help_option_names": ["-h", "--help"]}
    shared: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "context_settings": help_names}
    return typer.Typer(**shared | settings)


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run `app`; returns the exit code: 0 or that of a command's typer.Exit, 2 after an error, 130 after Ctrl-C, 1 if stdout was closed early.

    Args:
        app: Raises its errors as exceptions.
        name: Name of the command in its help.
        arguments: None takes those of the process.
    """
    _quiet()
    usage_error: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")  # type: ignore[assignment]  # typer exports no other name
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        code = app(args=given, prog_name=name, standalone_mode=False, obj=given)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter reports a failed flush when it exits
        return CLOSED_STDOUT
    except CommandFailed as failed:
        return _fail(str(failed), failed.code)
    except usage_error as err:
        # Without arguments typer has printed the help, and the message is empty.
        message = err.format_message()  # type: ignore[attr-defined]  # a method of ClickException
        return _fail(f"{_sentence(message)} `{name} --help` shows how.") if message else USER_ERROR
    except Exception as err:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(_words(err), _code(err))
    return _fail("Interrupted.", INTERRUPTED) if code == INTERRUPTED else int(code or 0)


def set_passive_openmp() -> None:
    """Let torch's idle threads sleep instead of spin; must be called before torch is imported.

    With another busy process on two cores, spinning made a forward pass of the shipped model's reference 3 to 15 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _sentence(text: str) -> str:
    """`text` with final punctuation, which is not doubled."""
    return text if text.endswith(("?", "!")) else text.rstrip(".") + "."


def _words(err: Exception) -> str:
    from edm_deploy.errors import EdmDeployError  # imports torch, which `--help` does not need

    if isinstance(err, EdmDeployError):
        return str(err)
    if isinstance(err, ModuleNotFoundError) and (message := missing_package(err)):
        return message
    if isinstance(err, OSError):
        return f"{err.filename or 'The system'}: {err.strerror or err}. Check the path and the free space."
    if isinstance(err, MemoryError) or any(words in str(err) for words in NO_MEMORY):
        return "Out of memory. Choose a smaller batch, or --low-memory where the command has it, which loads float weights only while they are used."
    return f"{type(err).__name__}: {err} - a fault of edm-deploy; please report it with the output of {TRACEBACK_VARIABLE}=1."


def _code(err: Exception) -> int:
    """Exit code of an error; a run that Ctrl-C or a lost process ended can only be raised by a command that has imported calibration."""
    for module, name, code in (("options", "Interrupted", INTERRUPTED), ("processes", "ProcessLostError", PROCESS_LOST)):
        loaded = sys.modules.get(f"calibration.run.{module}")
        if loaded is not None and isinstance(err, getattr(loaded, name)):
            return code
    return USER_ERROR


def _fail(message: str, code: int = USER_ERROR) -> int:
    line = " ".join(message.split())
    if path := os.environ.get(ERROR_FILE):
        Path(path).write_text(line)
    else:
        sys.stderr.write(f"Error: {line}\n")
    return code


def _quiet() -> None:
    """Suppress libraries' warnings and progress bars; their errors are still shown."""
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    for library in ("diffusers", "transformers"):  # they read the variables when they are imported
        if library in sys.modules:
            sys.modules[library].utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.ERROR, handlers=[Lines()])
    notes = Lines("Note: ")
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, Lines)] + [notes]


class Lines(logging.Handler):
    """Writes log records as lines on stderr, each distinct text once per command, because many layers may log the same."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        self.written: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record to the current stderr, unless its text was written before."""
        text = " ".join(record.getMessage().split())
        if text not in self.written:
            self.written.add(text)
            sys.stderr.write(f"{self.prefix}{text}\n")

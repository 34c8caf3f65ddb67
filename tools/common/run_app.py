"""Run a command line so that whatever a user can mend ends in one line on stderr and exit code 2, without libraries' chatter."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import typer

TRACEBACK_VARIABLE = "EDM_DEPLOY_TRACEBACK"  # set it to see where an error comes from
INTERRUPTED = 130  # what typer returns for Ctrl-C outside its standalone mode
NO_MEMORY = ("can't allocate memory", "CUDA out of memory")  # torch's RuntimeError and OutOfMemoryError
OURS = ("edm_deploy", "calibration", "engines", "edm_deploy_tools")  # whose warnings a user sees
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
}


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run `app`; returns the exit code, 0 or 2.

    Args:
        app: Raises what goes wrong.
        name: The command's, for its help.
        arguments: None takes the process's.
    """
    _quiet()
    usage_error = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        code = app(args=list(arguments) if arguments is not None else None, prog_name=name, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.")
    except usage_error as err:
        # No arguments at all: typer has printed the help, and has nothing to say.
        message = err.format_message()  # type: ignore[attr-defined]  # ClickException's own
        return _fail(f"{message.rstrip('.')}. `{name} --help` shows how.") if message else 2
    except Exception as err:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(_words(err))
    return _fail("Interrupted.") if code == INTERRUPTED else 0


def set_passive_openmp() -> None:
    """Let torch's idle threads sleep instead of spin; effective before torch is imported.

    Beside one other busy process on two cores, spinning made a forward pass of the shipped model's reference 3 to 15 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _words(err: Exception) -> str:
    from edm_deploy.errors import EdmDeployError  # loads torch, which `--help` does not wait for

    if isinstance(err, EdmDeployError):
        return str(err)
    if isinstance(err, OSError):
        return f"{err.filename or 'The system'}: {err.strerror or err}. Check the path and the free space."
    if isinstance(err, MemoryError) or any(words in str(err) for words in NO_MEMORY):
        return "Out of memory. Choose a smaller batch, or --low-memory where the command has it: float weights then stay in their files."
    return f"{type(err).__name__}: {err} - a fault of edm-deploy; please report it with what {TRACEBACK_VARIABLE}=1 prints."


def _fail(message: str) -> int:
    sys.stderr.write("Error: " + " ".join(message.split()) + "\n")
    return 2


def _quiet() -> None:
    """Keep libraries' chatter out of the output; their errors still come."""
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
    """Records as lines on stderr, each text once a command: what is at random for every layer is at random once for the reader."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless it has been said; to stderr as it is now."""
        text = " ".join(record.getMessage().split())
        if text not in self.said:
            self.said.add(text)
            sys.stderr.write(f"{self.prefix}{text}\n")

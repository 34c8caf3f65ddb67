"""What can go wrong, as three classes that a caller may want to tell apart. Every message says what was found, what was expected, and the mend."""

from __future__ import annotations


class EdmDeployError(Exception):
    """Base of all errors that a user can mend; the command line prints it in one line and exits with 2."""


class ArtifactError(EdmDeployError):
    """A file or directory is missing, damaged, hostile, or not what it was taken for."""


class UnsupportedError(EdmDeployError):
    """The request is well formed, but this model, target, backend or machine cannot carry it."""


class InputError(EdmDeployError, ValueError):
    """An option, a setting or a runtime input has a value outside its range."""


def flag(name: str) -> str:
    """The command line's option of this name, `--image-tokens` of `image_tokens`."""
    return "--" + name.replace("_", "-")


def first_line(err: BaseException) -> str:
    """The first line of an error's message that says something, without its full stop; the error's class where the message is empty."""
    return next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__).rstrip(".")

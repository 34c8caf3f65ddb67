"""Errors that a user can fix, in three classes. Every message states what was found, what is expected, and a remedy."""

from __future__ import annotations


class EdmDeployError(Exception):
    """Base of all errors that a user can fix; the command line prints the message in one line and exits with code 2."""


class ArtifactError(EdmDeployError):
    """A file or directory is missing, damaged, hostile, or of another kind than expected."""


class UnsupportedError(EdmDeployError):
    """The request is well formed, but this model, target, backend or machine does not support it."""


class InputError(EdmDeployError, ValueError):
    """An option, a setting or a runtime input has a value outside its range."""


def flag(name: str) -> str:
    """The command-line option of a name, `--image-tokens` for `image_tokens`."""
    return "--" + name.replace("_", "-")


def first_line(err: BaseException) -> str:
    """The first non-empty line of an error's message without its full stop; the name of the error's class where the message is empty."""
    return next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__).rstrip(".")

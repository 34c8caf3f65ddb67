"""Entry point of `edm-deploy` and of `python -m edm_deploy_tools`. It imports no other package before it can report that one is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edm_deploy_tools.common.extras import missing_package


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `edm-deploy`; returns the exit code.

    Args:
        arguments: None takes those of the process.
    """
    try:
        from edm_deploy_tools.cli import main as run
    except ModuleNotFoundError as err:
        if (message := missing_package(err)) is None:
            raise
        sys.stderr.write(f"Error: {message}\n")
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

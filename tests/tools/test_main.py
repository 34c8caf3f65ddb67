"""`tools/__main__.py`: the entry point, also where optional packages are missing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from edm_deploy_tools.__main__ import main


def run_without(package, *arguments):
    """The entry point in a new process in which `package` cannot be imported."""
    code = f"import sys; sys.modules[{package!r}] = None; from edm_deploy_tools.__main__ import main; sys.exit(main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_is_one_line_that_names_the_extra(package):
    ran = run_without(package, "--help")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f'Error: This command needs the package {package}, which is not installed. Install it with pip install "edm-deploy[tools]".\n'
    )


def test_a_missing_module_of_ours_is_no_missing_package():
    ran = run_without("edm_deploy_tools.cli", "--help")
    assert "Traceback" in ran.stderr


@pytest.mark.parametrize("module", ["edm_deploy_tools", "edm_deploy_tools.cli"])
def test_the_package_and_its_cli_run_as_modules(module):
    ran = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"edm-deploy {importlib.metadata.version('edm-deploy')}\n")


def test_the_arguments_are_passed_on(capsys):
    assert main(["inspect", "--help"]) == 0
    assert "PATH" in capsys.readouterr().out

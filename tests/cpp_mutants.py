"""Errors sown into C++ kernels, one at a time: tests must find each, or they prove nothing."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from edm_deploy.native.cpp import SHARED, source_files
from tests.engines.kernels.helpers.mutation import sow

Mutant = tuple[str, str, str]  # file, a text that it holds exactly once, what that becomes
AS_IT_IS: Mutant = ("simd.h", "#pragma once", "#pragma once")


def passes(folder: Path, home: str, tests: str, mutant: Mutant, select: str = "") -> bool:
    """Whether tests pass, with one replacement in the source.

    Args:
        folder: An empty one.
        home: Module with SOURCE, the folder of the kernels, and FLAGS, by which it compiles them.
        tests: Path of the tests.
        mutant: The replacement.
        select: Of the tests, as `pytest -k`.
    """
    source = folder / "source"
    source.mkdir(parents=True)
    for path in (*SHARED.glob("*.h"), *Path(importlib.import_module(home).SOURCE).iterdir()):
        if path.suffix in (".h", ".cpp"):
            shutil.copy(path, source)
    sow(source / mutant[0], *mutant[1:])
    program = (
        f"import pathlib, sys, pytest\nimport {home} as home\n"
        f"home.SOURCE = pathlib.Path({str(source)!r})\n"
        "home.FLAGS = tuple('-O1' if flag == '-O3' else flag for flag in home.FLAGS)\n"
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-k', {select!r}, {tests!r}]))"
    )
    environment = os.environ | {"EDM_DEPLOY_CACHE": str(folder / "cache"), "PYTEST_ADDOPTS": ""}
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode <= 1, ran.stdout + ran.stderr  # 1: a test failed; more: none ran
    return ran.returncode == 0


def not_once(home: str, mutants: dict[str, Mutant]) -> dict[str, int]:
    """The mutants whose text the source does not hold exactly once, and how often it does."""
    files = {name: content.decode() for name, content in source_files(importlib.import_module(home).SOURCE).items()}
    return {name: count for name, (file, old, _) in mutants.items() if (count := files[file].count(old)) != 1}

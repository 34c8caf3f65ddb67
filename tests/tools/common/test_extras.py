from __future__ import annotations

import tomllib
from pathlib import Path

from edm_deploy_tools.common.extras import EXTRAS, missing_package


def packages_of(extra: str) -> str:
    """Requirements of an extra, those of the extras that it includes too."""
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    included = [name.removeprefix("edm-deploy[").removesuffix("]") for name in extras[extra] if name.startswith("edm-deploy[")]
    return " ".join([*extras[extra], *(packages_of(name) for group in included for name in group.split(","))])


def test_each_extra_installs_its_packages():
    for package, extra in EXTRAS.items():
        assert package.replace("_", "-") in packages_of(extra)


def test_the_message_names_package_and_extra():
    message = missing_package(ModuleNotFoundError("No module named 'pyarrow.parquet'", name="pyarrow.parquet"))
    assert message == 'This command needs the package pyarrow, which is not installed. Install it with pip install "edm-deploy[train]".'


def test_a_package_of_no_extra_has_no_message():
    assert missing_package(ModuleNotFoundError("No module named 'x'", name="x")) is None
    assert missing_package(ModuleNotFoundError()) is None

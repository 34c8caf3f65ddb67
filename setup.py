"""Packages of the distribution: found, because setuptools' declarative finder cannot install `tools/` under another name."""

from setuptools import find_packages, setup

FOLDERS = {"edm_deploy": "edm_deploy", "calibration": "calibration", "engines": "engines", "tools": "edm_deploy_tools"}  # folder -> package

setup(
    packages=[
        ".".join([package, *name.split(".")[1:]])
        for folder, package in FOLDERS.items()
        for name in find_packages(include=[folder, f"{folder}.*"])
    ],
    package_dir={package: folder for folder, package in FOLDERS.items() if package != folder},
)

"""Hardware and package versions of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from edm_deploy.errors import UnsupportedError

PACKAGES = ("torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt_rtx", "tensorrt")


def measurement_conditions() -> dict[str, Any]:
    """Date, machine and versions, as they are stated with every measured figure."""
    return {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), **machine(), **versions()}


def machine() -> dict[str, Any]:
    """Processor, cores, torch's threads, memory in GB, operating system, and GPU if there is one."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def cpu_name() -> str:
    """The processor's name, as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Versions of edm-deploy and of each installed package that computes."""
    installed = {}
    for name in ("edm-deploy", *PACKAGES):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def check_versions(expected: Mapping[str, str], found: Mapping[str, str], *, where: str) -> None:
    """Refuse a process whose packages are not those of the process that started the work: its images could differ.

    Args:
        expected: Versions by package, as `versions` returns them.
        found: Those of the other process.
        where: The other process, as the beginning of a sentence.

    Raises:
        UnsupportedError: A package has another version.
    """
    for name, version in expected.items():
        if found.get(name) != version:
            has = found.get(name) or "none"
            raise UnsupportedError(f"{where} has {name} {has}, this process {version}. Install the same versions on every machine.")

"""What an engine is to the runtime, and what a backend must offer: the contract between `edm_deploy` and `engines`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from edm_deploy.errors import UnsupportedError
from edm_deploy.manifest import Manifest, Range
from edm_deploy.target import Execution, Target, target_named


class Session(Protocol):
    """An opened engine."""

    device: torch.device

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name for inputs by name: contiguous tensors on `device`, of the manifest's dtypes and within its profile."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a user may ask of a build. None means: the backend's own default. A backend refuses what it has not.

    Attributes:
        profile: Sizes by dynamic dimension; `batch` is always there.
        gpu: `rtx3090`, `rtx4090`, `sm_86`, ...; several with commas.
        precision: Floating-point type that the rest of the graph is computed in: `fp32`, `bf16`.
        optimization_level: 0 to 5, as TensorRT counts.
        timing_cache: File to read and extend.
        workspace_mib: Most scratch memory at build and run time, in MiB.
        threads: CPU threads of the engine.
        allow_float_sites: Accept a build in which a quantized site did not land in an integer layer.
    """

    profile: Mapping[str, Range] = field(default_factory=dict)
    gpu: str | None = None
    precision: str | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    workspace_mib: int | None = None
    threads: int | None = None
    allow_float_sites: bool = False


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a backend tells about an engine that it has just written.

    Attributes:
        versions: Of the packages that must be the same when it is opened, by name.
        options: The options as they took effect, defaults filled in.
        executed: How sites are really computed, where that was seen and differs from what the target promises, by site.
        warnings: What a user should know, one line each.
        details: More for the manifest's `build`.
    """

    versions: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    executed: Mapping[str, Execution] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Backend(ABC):
    """One way to build and run engines; `engines/<name>.py` holds it as BACKEND. Importing that file imports no vendor package.

    Attributes:
        name: As users type it.
        options: The fields of BuildOptions that it has, beyond `profile` and `allow_float_sites`.
    """

    name: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()

    @property
    def target(self) -> Target:
        """What it can carry."""
        return target_named(self.name)

    @abstractmethod
    def build(self, onnx: Path, manifest: Manifest, options: BuildOptions, out: Path) -> Built:
        """Write the engine's files into directory `out`.

        Args:
            onnx: The graph's file.
            manifest: The graph's manifest.
            options: Checked: every dynamic dimension has a Range, and only this backend's options are set.
            out: An empty directory.

        Raises:
            UnsupportedError: The backend is not installed here (the message says what to install), or cannot carry the graph.
        """

    @abstractmethod
    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        """Open an engine directory whose manifest and files have been checked.

        Raises:
            UnsupportedError: Not installed, built by another version or for another device.
        """

    def refuse_foreign_options(self, options: BuildOptions) -> None:
        """Raises UnsupportedError where an option is set that this backend has not."""
        for name in ("gpu", "precision", "optimization_level", "timing_cache", "workspace_mib", "threads"):
            if getattr(options, name) is not None and name not in self.options:
                flag = "--" + name.replace("_", "-")
                has = ", ".join(sorted("--" + option.replace("_", "-") for option in self.options)) or "none"
                raise UnsupportedError(f"{self.name} has no option {flag}. Leave it out; its options: {has}.")

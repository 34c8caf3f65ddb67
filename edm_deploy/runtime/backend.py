"""The contract between `edm_deploy` and `engines`: opened engines (Session) and backends (Backend)."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import SiteRecord
from edm_deploy.errors import InputError, UnsupportedError, flag
from edm_deploy.network.adapter_inputs import AdapterInputs
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.capabilities import BackendCapabilities, Execution, capabilities_of
from edm_deploy.runtime.manifest import Manifest, ShapeRange

Provider = Literal["cpu", "cuda", "tensorrt"]  # of ONNX Runtime
Content = TypeVar("Content")  # what a backend builds from, once read: the path of a graph, or an Artifact


class Session(ABC):
    """An opened engine.

    Thread safety: `run` may be called from several threads at once, and each call returns what it would return alone. A backend whose vendor computes
    one call at a time serializes them. `close` waits for the calls that are running and releases the engine's memory; a later `run` raises InputError.
    A session is a context manager that closes on exit.

    Attributes:
        device: Device of inputs and outputs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._changed = threading.Condition()  # guards the three fields below
        self._running = 0
        self._closed = False
        self._released = False

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute outputs by name from inputs by name.

        Args:
            inputs: Contiguous tensors on `device`, of the manifest's dtypes and within its profile. They are not modified. Adapter weights stay the same
                tensors from call to call until an adapter is loaded or removed, so that a session may keep what it did with them.

        Returns:
            Tensors on `device` that no later call overwrites.

        Raises:
            InputError: The session is closed.
        """
        with self._changed:
            if self._closed:
                raise InputError("This engine has been closed. Open it again with load_denoiser or open_session.")
            self._running += 1
        try:
            return self._infer(inputs)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Release the engine's memory once the running calls have returned. Closing again has no effect."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._running == 0)
            if not self._released:
                self._released = True
                self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `run`, of an open session; called from several threads at once."""

    @abstractmethod
    def _release(self) -> None:
        """Drop what holds the engine's memory; called once, while no `_infer` runs."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build. None selects the backend's default. A backend refuses options that it does not support.

    Attributes:
        profile: Sizes by dynamic dimension; always contains `batch`.
        gpu: `rtx3090`, `rtx4090`, `sm_86`, ...; several separated by commas.
        precision: Floating-point type that the rest of the graph is computed in: `fp32`, `bf16`, `fp16`.
        optimization_level: TensorRT's, 0 to 5.
        timing_cache: File to read and extend.
        workspace_mib: Maximum scratch memory at build and run time, in MiB.
        threads: CPU threads of the engine.
        provider: What ONNX Runtime runs on: its own CPU or CUDA kernels, or TensorRT.
        cuda_graphs: Whether ONNX Runtime captures a run once and replays it; every dimension then has one size.
        int4_where: `faster` runs a site whose codes fit 4 bits in INT8 where that is expected to be no slower; `fits` always runs it in INT4.
        rest: `inductor` compiles what is between a torch graph's quantized layers by torch.compile when the engine is opened; `eager` runs it as it is.
        attention: `int8` computes the products of queries and keys of a torch graph in INT8 where a kernel has them; `float` as the model does.
        lora_rank: Rank slots of the adapter branches of an engine that is built from an artifact; None for none.
        lora_layers: Regular expression of the published layers that have a branch.
        allow_float_sites: Whether to accept a build in which a quantized site is not computed in integers, on backends that otherwise refuse it.
    """

    profile: Mapping[str, ShapeRange] = field(default_factory=dict)
    gpu: str | None = None
    precision: str | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    workspace_mib: int | None = None
    threads: int | None = None
    provider: Provider | None = None
    cuda_graphs: bool | None = None
    int4_where: Literal["fits", "faster"] | None = None
    rest: Literal["eager", "inductor"] | None = None
    attention: Literal["float", "int8"] | None = None
    lora_rank: int | None = None
    lora_layers: str | None = None
    allow_float_sites: bool = False


COMMON_OPTIONS = frozenset({"profile", "allow_float_sites"})  # supported by every backend


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """Description of an engine that a backend has written.

    Attributes:
        versions: Package versions that must match when the engine is opened, by package name.
        options: The options in effect, with defaults filled in.
        executed: How sites are executed, where the build observed it, by site; takes precedence over the backend's capabilities.
        codes: The kernel's code format, by site, where the backend selects one.
        warnings: Messages for the user, one line each.
        details: Further entries of the manifest's `build`.
        adapters: The adapter branches, where the backend made them; None keeps those of the source.
    """

    versions: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    executed: Mapping[str, Execution] = field(default_factory=dict)
    codes: Mapping[str, CodeFormat] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    adapters: AdapterInputs | None = None


@dataclass(frozen=True, kw_only=True)
class SiteTestCase:
    """Inputs and expected outputs of every site in isolation. An engine is compared with the reference one site at a time.

    Attributes:
        artifact: The artifact of the sites.
        timestep: float32 [B], one per sample.
        records: By site: the input `x`, and the expected `codes` and `y`.
        adapters: Adapter branches of the sites; None for none.
        adapter_values: float32, the values of their inputs by name.
        scratch: Directory in which a backend may cache what it builds; engines of one artifact share the cut graph.
    """

    artifact: Artifact
    timestep: Tensor
    records: Mapping[str, SiteRecord]
    scratch: Path
    adapters: AdapterInputs | None = None
    adapter_values: Mapping[str, Tensor] = field(default_factory=dict)


class Backend(ABC, Generic[Content]):
    """A way to build and run engines; `engines/<name>.py` defines it as BACKEND. Importing that file imports no vendor package.

    Attributes:
        name: Name on the command line.
        builds_from: Kind of directory it builds from.
        options: The fields of BuildOptions that it supports in addition to COMMON_OPTIONS.
        device: Default device of its engines.
    """

    name: ClassVar[str]
    builds_from: ClassVar[Literal["onnx", "artifact"]]
    options: ClassVar[frozenset[str]] = frozenset()
    device: ClassVar[str] = "cpu"

    @property
    def target(self) -> BackendCapabilities:
        """The capabilities of the backend."""
        return capabilities_of(self.name)

    @abstractmethod
    def read(self, source: Path) -> tuple[Content, Manifest]:
        """Read and check a source; returns its content and the manifest that the engine's is derived from.

        Raises:
            ArtifactError: `source` is damaged or of another kind; the message names the command that makes the right one.
            UnsupportedError: The backend does not support it.
        """

    @abstractmethod
    def relaxed(self, source: Path, content: Content) -> tuple[Content, Manifest]:
        """As `read`, for the second graph: the same weights with inputs of more bits. Called where the manifest has relaxed timesteps.

        Args:
            source: The argument of `read`.
            content: What `read` returned.

        Raises:
            ArtifactError, UnsupportedError: As `read`.
        """

    @abstractmethod
    def build(self, content: Content, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        """Write the engine's files into directory `out`.

        Args:
            content: What `read` returned.
            manifest: The manifest that `read` returned.
            options: Checked: every dynamic dimension has a ShapeRange, and only this backend's options are set.
            out: An empty directory.

        Raises:
            UnsupportedError: The backend is not installed (the message names what to install), or does not support the content.
        """

    @abstractmethod
    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        """Open an engine directory whose manifest and files have been checked.

        Raises:
            UnsupportedError: The backend is not installed, or the engine was built by another version or for another device.
        """

    @abstractmethod
    def at_sites(self, cut: SiteTestCase, engine: Manifest, device: torch.device) -> dict[str, Tensor]:
        """Compute each site in isolation, built with the options of `engine`: returns `<site>.codes`, integers, and `<site>.y`.

        Raises:
            UnsupportedError: The backend cannot run on this machine.
        """

    def default_device(self, manifest: Manifest) -> str:
        """Device that an engine is opened on where none is named."""
        return self.device

    def site_dtype(self, engine: Manifest) -> torch.dtype:
        """Floating-point type of a site's input before its quantizer. Both sides of a comparison start from values of this type."""
        return torch.float32

    def refuse_foreign_options(self, options: BuildOptions) -> None:
        """Raises UnsupportedError where an option is set that this backend does not support."""
        for name in sorted({option.name for option in fields(BuildOptions)} - COMMON_OPTIONS - self.options):
            if getattr(options, name) is not None:
                if name.startswith("lora") and self.builds_from == "onnx":
                    raise UnsupportedError(
                        f"{self.name} builds from a graph, which has the adapter branches. Give {flag(name)} to edm-deploy export."
                    )
                has = ", ".join(sorted(flag(option) for option in self.options)) or "none"
                raise UnsupportedError(f"{self.name} has no option {flag(name)}. Leave it out; its options: {has}.")

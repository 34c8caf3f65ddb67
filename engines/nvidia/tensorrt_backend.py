"""Base of the TensorRT and TensorRT-RTX backends, whose packages have the same Python API. Subclasses name the vendor's module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.backend import BuildOptions, BuildResult, Session
from edm_deploy.runtime.capabilities import Execution
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy.storage.directories import write_json
from edm_deploy.storage.leftovers import scratch_directory
from engines.common.serialized_runs import SerializedRuns
from engines.common.source_backends import GraphBackend
from engines.common.vendor_package import refuse_other_build, vendor
from engines.nvidia.build_process import BuildRequest, run_in_child
from engines.nvidia.layer_audit import EngineLayer, LayerAudit, audit
from engines.performance.gpus import capabilities, has_int4

ENGINE_NAME = "engine.trt"
AUDIT_NAME = "audit.json"
OPTIMIZATION_LEVELS = range(6)


class Nvinfer(GraphBackend):
    """A backend whose vendor package has TensorRT's API.

    A site with quantized input that is not in an integer layer fails the build, or is a warning with `--allow-float-sites`. INT4 plugin nodes are not audited.

    Attributes:
        package: The vendor's module.
        module: Module that is run as the child process.
        install: Remedy where the package is missing.
        default_gpus: Compute capabilities to build for where none is named; empty means this machine's GPU.
    """

    package: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    default_gpus: ClassVar[tuple[str, ...]] = ()
    device: ClassVar[str] = "cuda"

    def build(self, content: Path, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        gpus = capabilities(options.gpu) if options.gpu else self.default_gpus
        _check_level(options.optimization_level)
        version = str(vendor(self.package, remedy=self.install).__version__)
        with scratch_directory("tensorrt") as scratch:
            request = BuildRequest(
                graph=str(content.resolve()),
                engine=str(out / ENGINE_NAME),
                reply=f"{scratch}/reply.json",
                shapes={declared.name: _shapes(declared.dims, options.profile) for declared in manifest.graph_inputs},
                gpus=gpus,
                optimization_level=options.optimization_level,
                timing_cache=str(options.timing_cache.resolve()) if options.timing_cache else None,
                workspace_mib=options.workspace_mib,
                plugins=bool(manifest.plugin_sites),
            )
            reply = run_in_child(self.module, request, scratch)
        plugins = manifest.plugin_sites  # not audited: their nodes are our kernels, or the graph would not have parsed
        audited = {name: site for name, site in manifest.sites.items() if name not in plugins}
        findings = audit([EngineLayer(**{key: _tuples(value) for key, value in layer.items()}) for layer in reply["layers"]], audited)
        write_json(out / AUDIT_NAME, {site: asdict(finding) for site, finding in findings.items()})
        floats = {site: finding for site, finding in findings.items() if finding.problem}
        if floats and not options.allow_float_sites:
            raise UnsupportedError(_refusal(self.name, floats, len(findings)))
        return BuildResult(
            versions={self.package: version},
            options={"optimization_level": options.optimization_level, "workspace_mib": options.workspace_mib},
            executed={site: _executed(finding) for site, finding in findings.items()} | dict.fromkeys(plugins, "int4"),
            codes=plugins,
            warnings=_warnings(manifest, floats, reply["gpus"]),
            details={"gpus": reply["gpus"], "layers": len(reply["layers"]), "sites_in_integer_layers": len(findings) - len(floats)},
        )

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        """Open an engine on a CUDA device. Written against the documented API; not executed on a GPU yet."""
        gpus = manifest.build.get("gpus", [])
        manifest.require_files(ENGINE_NAME)
        if manifest.backend == self.name and (device.type != "cuda" or not torch.cuda.is_available()):
            raise UnsupportedError(
                f"This engine needs an NVIDIA GPU (built for {', '.join(gpus)}); device is {device}, and torch finds "
                f"{torch.cuda.device_count()} CUDA devices here. Open it with device='cuda' on a machine that has one, or build for ort or openvino."
            )
        module = vendor(self.package, remedy=self.install)
        refuse_other_build(manifest, self.name, self.package, str(module.__version__))
        here = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if here not in gpus:
            raise UnsupportedError(
                f"This engine was built for {', '.join(gpus)}; {torch.cuda.get_device_name(device)} is {here}. Build it again for this GPU."
            )
        return NvinferSession(module, directory / ENGINE_NAME, manifest, device)


class NvinferSession(Session):
    """An engine on torch's CUDA tensors, on torch's current stream. Written against the documented API; not executed on a GPU yet.

    An execution context serves one thread and one stream at a time, so runs are serialized.
    Source: NVIDIA TensorRT documentation, Developer Guide, "Threading".
    """

    def __init__(self, module: Any, engine: Path, manifest: Manifest, device: torch.device) -> None:
        super().__init__(device)
        self._runs = SerializedRuns(device)
        self.inputs = [declared.name for declared in manifest.graph_inputs]
        self.outputs = manifest.outputs
        self._runtime = module.Runtime(module.Logger(module.Logger.WARNING))
        with torch.cuda.device(device):
            self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
            if self._engine is None:
                raise UnsupportedError(f"{engine} was refused by {module.__name__} {module.__version__} on this GPU. Build it again here.")
            self._context = self._engine.create_execution_context()
        types = {
            "FLOAT": torch.float32,
            "HALF": torch.float16,
            "BF16": torch.bfloat16,
            "INT8": torch.int8,
            "INT32": torch.int32,
            "INT64": torch.int64,
        }
        self._types = {name: types[self._engine.get_tensor_dtype(name).name] for name in self.outputs}

    def _infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Asynchronous, as any kernel on torch's current stream."""
        contiguous = {name: inputs[name].contiguous() for name in self.inputs}  # the engine takes an address, no strides
        results = {}
        with self._runs.next() as stream:
            for name, value in contiguous.items():
                self._context.set_input_shape(name, tuple(value.shape))
                self._context.set_tensor_address(name, value.data_ptr())
            for name in self.outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                results[name] = torch.empty(shape, dtype=self._types[name], device=self.device)
                self._context.set_tensor_address(name, results[name].data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("TensorRT could not enqueue the engine; its message is on stderr.")
        return results

    def _release(self) -> None:
        self._runs.finish()
        self._context = self._engine = self._runtime = None


def _shapes(dims: tuple[str | int, ...], profile: Mapping[str, ShapeRange]) -> list[list[int]]:
    return [[dim if isinstance(dim, int) else getattr(profile[dim], which) for dim in dims] for which in ("min", "opt", "max")]


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _executed(finding: LayerAudit) -> Execution:
    return "float" if finding.problem else "int8"


def _check_level(level: int | None) -> None:
    if level is not None and level not in OPTIMIZATION_LEVELS:
        raise UnsupportedError(f"--optimization-level {level}: expected {OPTIMIZATION_LEVELS.start} to {OPTIMIZATION_LEVELS.stop - 1}.")


def _refusal(backend: str, floats: Mapping[str, LayerAudit], total: int) -> str:
    site, finding = next(iter(floats.items()))
    return (
        f"{len(floats)} of {total} quantized sites did not land in an integer layer of {backend}; first {site!r}: {finding.problem}. "
        "Export the graph again with edm-deploy export, or accept it with --allow-float-sites."
    )


def _warnings(manifest: Manifest, floats: Mapping[str, LayerAudit], gpus: Sequence[str]) -> tuple[str, ...]:
    warnings = [f"{site}: {finding.problem}" for site, finding in floats.items()]
    if manifest.dtype == "fp32":
        warnings.append("The graph between the quantized sites is float32, which is slow on a GPU; export with --dtype fp16.")
    if manifest.plugin_sites and (without := [gpu for gpu in gpus if not has_int4(gpu)]):
        warnings.append(
            f"{', '.join(without)} has no INT4 tensor cores: the {len(manifest.plugin_sites)} plugin sites are exact there, and slow. "
            "Export without --int4 plugin for it."
        )
    return tuple(warnings)

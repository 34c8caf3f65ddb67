"""The build, in a child process because some graphs crash the builder. `run_in_child` is the parent's side, `main` the child's.

The vendor's module is passed in, so that TensorRT and TensorRT-RTX share this file.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edm_deploy.errors import EdmDeployError, UnsupportedError
from edm_deploy.storage.directories import read_json, write_json
from engines.common.vendor_package import vendor
from engines.nvidia.layer_audit import EngineLayer, layers_from_inspector, layers_from_log


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the child process builds; the fields are serialized as JSON.

    Attributes:
        graph, engine, reply: Paths of the ONNX file, the engine to write and the reply to write.
        shapes: Minimum, optimal and maximum shape, by input.
        gpus: Compute capabilities, `sm_86`; empty means this machine's GPU.
        optimization_level, timing_cache, workspace_mib: As in BuildOptions.
        plugins: Whether the graph contains nodes of our plugins.
    """

    graph: str
    engine: str
    reply: str
    shapes: Mapping[str, list[list[int]]]
    gpus: tuple[str, ...] = ()
    optimization_level: int | None = None
    timing_cache: str | None = None
    workspace_mib: int | None = None
    plugins: bool = False


def run_in_child(module: str, request: BuildRequest, scratch: Path) -> dict[str, Any]:
    """Run `python -m <module> <request>` and return its reply.

    Raises:
        UnsupportedError: The child refused the graph (its message), or crashed (the signal).
    """
    write_json(scratch / "request.json", asdict(request))
    child = subprocess.run([sys.executable, "-m", module, str(scratch / "request.json")], stderr=subprocess.PIPE, text=True, check=False)
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise UnsupportedError(
            f"The builder crashed ({name}) on {request.graph}. The graph contains a form that it cannot build; "
            "export it with edm-deploy export, which writes none that is known to crash, or build for ort or openvino."
        )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode} without a message"]
        raise UnsupportedError(lines[-1])
    return read_json(Path(request.reply), what="build reply")


def main(package: str, install: str, register_plugins: Callable[[], None] | None = None) -> None:
    """Body of the child process: build the request in argv[1]. A refusal is one line on stderr and exit status 2.

    Args:
        package: The vendor's module.
        install: Remedy where it is missing.
        register_plugins: Called before a graph that needs plugins is parsed.
    """
    request = BuildRequest(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        module = vendor(package, remedy=install)
        if request.plugins:
            assert register_plugins is not None, "capabilities.check_plugins admits plugin nodes only for backends that register them"
            register_plugins()
        write_json(Path(request.reply), build_here(module, request))
    except (EdmDeployError, OSError) as err:
        print(str(err).replace("\n", " "), file=sys.stderr)
        sys.exit(2)


def build_here(module: Any, request: BuildRequest) -> dict[str, Any]:
    """Build in this process.

    Returns:
        `layers`, as the builder reports them, and `gpus`, the compute capabilities.

    Raises:
        UnsupportedError: The parser or the builder refuses the graph.
    """
    log = _log_of(module)
    builder = module.Builder(log)
    flags = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # newer releases are always strongly typed
    network = builder.create_network(1 << int(flags) if flags is not None else 0)
    parser = module.OnnxParser(network, log)
    if not parser.parse_from_file(request.graph):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise UnsupportedError(f"{module.__name__} {module.__version__} cannot parse {request.graph}: {'; '.join(errors)}")
    config = _config(module, builder, request)
    cache = _read_cache(config, request.timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UnsupportedError(f"{module.__name__} {module.__version__} cannot build {request.graph}: {log.last_error()}")
    Path(request.engine).write_bytes(engine)
    if cache is not None and request.timing_cache:
        Path(request.timing_cache).write_bytes(cache.serialize())
    layers = layers_from_log(log.messages) if request.gpus else _inspected(module, log, engine)
    gpus = request.gpus or ["sm_{}{}".format(*torch.cuda.get_device_capability())]
    return {"layers": [asdict(layer) for layer in layers], "gpus": list(gpus)}


def _config(module: Any, builder: Any, request: BuildRequest) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.workspace_mib is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, request.workspace_mib << 20)
    if request.gpus:
        config.num_compute_capabilities = len(request.gpus)
        for index, gpu in enumerate(request.gpus):
            config.set_compute_capability(_compute_capability(module, gpu), index)
    profile = builder.create_optimization_profile()
    for name, shapes in request.shapes.items():
        profile.set_shape(name, *map(tuple, shapes))
    config.add_optimization_profile(profile)
    return config


def _compute_capability(module: Any, gpu: str) -> Any:
    able = module.ComputeCapability.__members__
    if (name := gpu.replace("_", "").upper()) not in able:
        known = ", ".join(
            f"sm_{member[2:]}" for member in sorted(able, key=lambda member: (len(member), member)) if member.startswith("SM")
        )
        raise UnsupportedError(
            f"{module.__name__} {module.__version__} cannot build for {gpu}; it can for {known}. Use --backend trt on that machine."
        )
    return able[name]


def _read_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(Path(path).read_bytes() if Path(path).is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _inspected(module: Any, log: Any, engine: Any) -> list[EngineLayer]:
    """Layers from the engine inspector, which needs the GPU. Not executed on a GPU yet."""
    live = module.Runtime(log).deserialize_cuda_engine(engine)
    return layers_from_inspector(live.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON))


def _log_of(module: Any) -> Any:
    class Log(module.ILogger):  # type: ignore[misc]  # the base class comes with the vendor's module
        """Stores every message: the layer table is one of the verbose ones."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason."

    return Log()

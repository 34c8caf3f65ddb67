"""Our INT8 kernels for CPUs in the torch graph: built from the artifact, compiled for the CPU that opens the engine; the rest in bfloat16 or float16."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import UnsupportedError
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.backend import BuildOptions, BuildResult, Session, SiteTestCase
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.tensor_file import load_tensors
from engines.common.precision import supported_precision
from engines.common.source_backends import ArtifactBackend
from engines.from_artifact import packed_engine
from engines.from_artifact.packed_engine import DTYPES, ENGINE_NAME, LAYOUT

log = logging.getLogger(__name__)

WITHOUT_VNNI = ("AVX2", "portable")  # what the kernels compute products with on CPUs that have no instruction for them


class CpuBackend(ArtifactBackend):
    """The kernels of `engines/kernels/cpu/`, in the graph that torch.export traces from the float model when the engine is opened.

    Its engines are those of `cuda`: weights of sites whose codes fit 4 bits are stored in 4 bits, and widened when the engine is opened, because
    every integer site is computed in INT8. Nothing in an engine depends on a CPU; the kernels are compiled where it is opened, which needs a C++ compiler there. A site with quantized
    input that no kernel computes (groups, dilation, another filter size) fails the build, or is a warning with `--allow-float-sites`. Weight-only sites run in
    floating point and are always a warning.
    """

    name: ClassVar[str] = "cpu"
    options: ClassVar[frozenset[str]] = frozenset({"precision", "threads", "lora_rank", "lora_layers"})

    def build(self, content: Artifact, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        precision = supported_precision(options.precision, self.target)
        adapters = packed_engine.requested_adapters(content, options)
        plans, warnings = packed_engine.accepted_plan(content, self.target, options)
        packed_engine.write_engine(content, plans, DTYPES[precision], out, adapters=adapters)
        return BuildResult(
            versions={},
            options={"precision": precision, "threads": options.threads},
            executed={name: plan.executed for name, plan in plans.items()},
            codes={name: plan.codes for name, plan in plans.items() if plan.codes},
            warnings=warnings,
            details={"layout": LAYOUT},
            adapters=adapters,
        )

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        from engines.from_artifact.recorded_session import RecordedSession  # registers operators, so imported on use
        from engines.torch_graph import fusions

        packed_engine.refuse_foreign(manifest, self.name)
        manifest.require_files(ENGINE_NAME)
        _check_kernels(device)
        rewritten, _ = packed_engine.open_graph(manifest, load_tensors(directory / ENGINE_NAME), _formats(manifest))
        fusions.fuse(rewritten)
        return RecordedSession(
            rewritten.module(),
            [declared.name for declared in manifest.graph_inputs],
            manifest.outputs,
            device,
            threads=_threads(manifest),
            kept=packed_engine.adapter_weights(manifest),
        )

    def at_sites(self, cut: SiteTestCase, engine: Manifest, device: torch.device) -> dict[str, Tensor]:
        """Record the unfused graph, cut at every site: what the kernels compute, site by site."""
        from engines.kernels.cpu.weights import Weights
        from engines.torch_graph.recorded_graph import RecordedGraph

        _check_kernels(device)
        weights = Weights()
        with torch.inference_mode():
            return packed_engine.run_at_sites(
                cut,
                engine,
                device,
                _formats(engine),
                lambda module, inputs: RecordedGraph(module, inputs, weights, _threads(engine)).outputs,
            )

    def site_dtype(self, engine: Manifest) -> torch.dtype:
        return packed_engine.site_dtype(engine)


BACKEND = CpuBackend()


def _check_kernels(device: torch.device) -> None:
    """Compile the kernels, or report that they cannot be, before any weight is read.

    Raises:
        UnsupportedError: The device is not the CPU, or this machine has no C++ compiler that compiles them.
    """
    from engines.kernels.cpu.build import instructions

    if device.type != "cpu":
        raise UnsupportedError(f"cpu runs on the cpu, not on {device.type}. Open the engine with device='cpu', or build for cuda.")
    if (computed_by := instructions()) in WITHOUT_VNNI:
        log.warning(
            "This CPU has no VNNI instructions: INT8 products are computed by %s code, and openvino is likely to be faster here.",
            computed_by,
        )
    else:
        log.info("INT8 products are computed by %s.", computed_by)


def _formats(manifest: Manifest) -> dict[str, CodeFormat | None]:
    """Code format in which each site runs: the kernels multiply codes of 8 bits, and weights packed in 4 bits are widened."""
    return {name: None if plan.codes is None else "s8" for name, plan in manifest.plan.items()}


def _threads(manifest: Manifest) -> int:
    threads: int | None = manifest.build["options"].get("threads")
    return threads or torch.get_num_threads()

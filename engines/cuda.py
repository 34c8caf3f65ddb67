"""Our INT4 and INT8 kernels in the torch graph: built from the artifact; W4A4 on INT4 tensor cores, the rest in float16 or bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.backend import BuildOptions, BuildResult, Session, SiteTestCase
from edm_deploy.runtime.capabilities import SitePlan
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.tensor_file import load_tensors
from engines.common.precision import supported_precision
from engines.common.source_backends import ArtifactBackend
from engines.from_artifact import packed_engine
from engines.from_artifact.packed_engine import DTYPES, ENGINE_NAME, LAYOUT
from engines.kernels.driver import LEAST_CAPABILITY, arch_of
from engines.kernels.launch import OCTET
from engines.performance.gpus import capabilities, has_int4, has_kernels
from engines.performance.int4_selection import select_int4
from engines.torch_graph.graph_options import GraphOptions

if TYPE_CHECKING:
    from torch import fx

    from engines.torch_graph.rewrite import GraphRewrite

log = logging.getLogger(__name__)

DEFAULT_GPU = "sm_86"  # where none is named and this machine has none


class CudaBackend(ArtifactBackend):
    """The kernels of `engines/kernels/`, in the graph that torch.export traces from the float model when the engine is opened.

    A site with quantized input that no kernel computes (groups, dilation, another filter size) fails the build, or is a warning with
    `--allow-float-sites`. Weight-only sites run in floating point and are always a warning.
    """

    name: ClassVar[str] = "cuda"
    options: ClassVar[frozenset[str]] = frozenset({"gpu", "precision", "int4_where", "rest", "attention", "lora_rank", "lora_layers"})
    device: ClassVar[str] = "cuda"

    def build(self, content: Artifact, manifest: Manifest, options: BuildOptions, out: Path) -> BuildResult:
        gpu, precision = _gpu(options.gpu), supported_precision(options.precision, self.target)
        if options.lora_rank is not None:  # the kernels have branches of ranks in steps of eight; the slots added are empty
            options = replace(options, lora_rank=-(-options.lora_rank // OCTET) * OCTET)
        adapters = packed_engine.requested_adapters(content, options)
        plans, warnings = packed_engine.accepted_plan(content, self.target, options)
        choice = select_int4(plans, content, options)
        plans = dict(choice.plans)
        packed_engine.write_engine(content, plans, DTYPES[precision], out, adapters=adapters)
        executed = {name: "int8" if plan.executed == "int4" and not has_int4(gpu) else plan.executed for name, plan in plans.items()}
        return BuildResult(
            versions={},
            options={"gpu": gpu, "precision": precision, **GraphOptions.requested(options).to_json()},
            executed=executed,
            codes={name: plan.codes for name, plan in plans.items() if plan.codes},
            warnings=(*warnings, *_narrow_warnings(plans, gpu), *choice.reasons),
            details={"layout": LAYOUT, "int4_run_as_int8": sorted(choice.as_int8)},
            adapters=adapters,
        )

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        from engines.kernels import build, driver
        from engines.torch_graph.cuda_graph_session import CudaSession  # registers operators, so imported on use
        from engines.torch_graph.kernel_sources import kernel_sources

        packed_engine.refuse_foreign(manifest, self.name)
        manifest.require_files(ENGINE_NAME)
        kinds, chosen = code_formats_on(manifest, device), GraphOptions.recorded(manifest.build["options"])
        if device.type == "cuda":
            driver.prepare(device)  # report a missing compiler or an old driver before any weight is read
            if chosen.attention == "int8":
                driver.prepare(device, build.ATTENTION)
        module = fused_graph(manifest, load_tensors(directory / ENGINE_NAME, device=str(device)), kinds)[0].module()
        if device.type == "cuda":
            for source in kernel_sources(module.graph):  # compiled now, not in the first call
                driver.prepare(device, source)
        if chosen.rest == "inductor":
            from engines.torch_graph.compiled_rest import compiled_rest

            module = compiled_rest(module, device)
        inputs = [declared.name for declared in manifest.graph_inputs]
        return CudaSession(module, inputs, manifest.outputs, device, kept=packed_engine.adapter_weights(manifest))

    def at_sites(self, cut: SiteTestCase, engine: Manifest, device: torch.device) -> dict[str, Tensor]:
        """Run the unfused graph, cut at every site."""
        return packed_engine.run_at_sites(cut, engine, device, code_formats_on(engine, device), lambda module, inputs: module(*inputs))

    def site_dtype(self, engine: Manifest) -> torch.dtype:
        return packed_engine.site_dtype(engine)


BACKEND = CudaBackend()


def fused_graph(
    manifest: Manifest, tensors: Mapping[str, Tensor], kinds: Mapping[str, CodeFormat | None]
) -> tuple[GraphRewrite, dict[str, fx.Node]]:
    """As `packed_engine.open_graph`, with all fusions and the attention of the engine's options."""
    from engines.torch_graph import fusions
    from engines.torch_graph.attention import attention_in_int8

    rewritten, branches = packed_engine.open_graph(manifest, tensors, kinds)
    fusions.fuse(rewritten, branches=True)
    if GraphOptions.recorded(manifest.build["options"]).attention == "int8" and not attention_in_int8(rewritten):
        log.warning("--attention int8: this model has no attention that the kernels compute; all of it runs in floating point.")
    return rewritten, branches


def code_formats_on(manifest: Manifest, device: torch.device) -> dict[str, CodeFormat | None]:
    """Code format of the kernel that runs each site on a device: as the engine was packed, or INT8 where there are no INT4 tensor cores.

    Weights are widened when the engine is opened, with the same codes, so an engine opens on every GPU that the kernels support.

    Raises:
        UnsupportedError: The device does not exist, or its GPU is too old.
    """
    planned = str(manifest.build["options"]["gpu"])
    gpu = planned if device.type == "cpu" else _present(device)
    if device.type == "cpu":
        log.warning("A cuda engine on the CPU checks arithmetic, not speed: the kernels' sums in plain torch.")
    elif has_int4(gpu) != has_int4(planned):
        log.warning(
            "This engine was planned for %s and runs on %s, which has %s INT4 tensor cores: sites of 4 bits run as %s.",
            planned,
            gpu,
            "" if has_int4(gpu) else "no",
            "INT4" if has_int4(gpu) else "INT8",
        )
    return {name: None if plan.codes is None else plan.codes if has_int4(gpu) else "s8" for name, plan in manifest.plan.items()}


def _present(device: torch.device) -> str:
    """Compute capability, `sm_86`, of a CUDA device."""
    if device.type != "cuda":
        raise UnsupportedError(f"cuda runs on NVIDIA GPUs, not on {device.type}. Open the engine with device='cuda'.")
    if not torch.cuda.is_available():
        missing = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA driver or GPU"
        raise UnsupportedError(
            f"This engine needs an NVIDIA GPU, and {missing} here. Run it on a machine that has one, or build for ort or openvino; "
            "device 'cpu' (--device cpu) checks its arithmetic, slowly."
        )
    gpu = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    _refuse_old(gpu, torch.cuda.get_device_name(device))
    return gpu


def _refuse_old(gpu: str, name: str) -> None:
    if not has_kernels(gpu):
        raise UnsupportedError(
            f"{name} is {gpu}; the kernels need {arch_of(LEAST_CAPABILITY)} or later. Build with --backend ort, openvino or trt instead."
        )


def _gpu(requested: str | None) -> str:
    if requested is None:
        return _present(torch.device("cuda")) if torch.cuda.is_available() else DEFAULT_GPU
    named = capabilities(requested)
    if len(named) > 1:
        raise InputError(
            f"--gpu {requested}: name one GPU. The plan is for one; the engine opens on any from {arch_of(LEAST_CAPABILITY)} on."
        )
    _refuse_old(named[0], requested)
    return named[0]


def _narrow_warnings(plans: Mapping[str, SitePlan], gpu: str) -> tuple[str, ...]:
    narrow = sum(plan.executed == "int4" for plan in plans.values())
    if narrow and not has_int4(gpu):
        return (f"{gpu} has no INT4 tensor cores: {narrow} sites whose codes fit 4 bits run as INT8.",)
    return ()

"""Our INT4 and INT8 kernels in the torch graph: built from the artifact; W4A4 on INT4 tensor cores, the rest in float16 or bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from edm_deploy.adapters.site_weights import FACTORS_NAME, adapters_of, site_factors
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.adapter_inputs import AdapterInputs
from edm_deploy.network.float_program import exported_program
from edm_deploy.network.meta_model import meta_model
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.backend import BuildOptions, BuildResult, Session, SiteTestCase
from edm_deploy.runtime.capabilities import BackendCapabilities, SitePlan, site_plan, unsupported_reason
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.tensor_file import load_tensors
from engines.common.graph_checks import check_rows, check_tensors
from engines.common.precision import supported_precision
from engines.common.source_backends import ArtifactBackend
from engines.common.vendor_package import refuse_other_backend
from engines.kernels.driver import LEAST_CAPABILITY, arch_of
from engines.performance.gpus import capabilities, has_int4, has_kernels
from engines.performance.int4_selection import select_int4
from engines.torch_graph.graph_options import GraphOptions

if TYPE_CHECKING:
    from torch import fx

    from engines.torch_graph.rewrite import GraphRewrite

log = logging.getLogger(__name__)

ENGINE_NAME = "engine.safetensors"
PARAMS, ROWS = "params.", "row_of_timestep"  # names in the engine's file; those of a layer are packed_layer.tensor_name
LAYOUT = 1  # version of the packed weights; incremented when an older file would be misread
DEFAULT_GPU = "sm_86"  # where none is named and this machine has none
DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


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
        adapters = _adapters(content, options)
        plans, reasons = plan_with_reasons(content, self.target)
        if reasons and not options.allow_float_sites:
            site, reason = next(iter(reasons.items()))
            raise UnsupportedError(
                f"{len(reasons)} of {len(plans)} quantized sites have no integer kernel in cuda; first {site!r}: {reason}. "
                "Accept exact codes with floating-point arithmetic there with --allow-float-sites, or build for openvino."
            )
        choice = select_int4(plans, content, options)
        plans = dict(choice.plans)
        save_file(_stored(content, plans, DTYPES[precision]), out / ENGINE_NAME)
        if adapters is not None and (factors := site_factors(content, adapters)):
            save_file(factors, out / FACTORS_NAME)
        executed = {name: "int8" if plan.executed == "int4" and not has_int4(gpu) else plan.executed for name, plan in plans.items()}
        return BuildResult(
            versions={},
            options={"gpu": gpu, "precision": precision, **GraphOptions.requested(options).to_json()},
            executed=executed,
            codes={name: plan.codes for name, plan in plans.items() if plan.codes},
            warnings=(*_warnings(plans, reasons, gpu), *choice.reasons),
            details={"layout": LAYOUT, "int4_run_as_int8": sorted(choice.as_int8)},
            adapters=adapters,
        )

    def open(self, directory: Path, manifest: Manifest, device: torch.device) -> Session:
        from engines.kernels import build, driver
        from engines.torch_graph.cuda_graph_session import CudaSession  # registers operators, so imported on use

        _refuse_foreign(manifest)
        manifest.require_files(ENGINE_NAME)
        kinds, chosen = code_formats_on(manifest, device), GraphOptions.recorded(manifest.build["options"])
        if device.type == "cuda":
            driver.prepare(device)  # report a missing compiler or an old driver before any weight is read
            if chosen.attention == "int8":
                driver.prepare(device, build.ATTENTION)
        module = _graph(manifest, load_tensors(directory / ENGINE_NAME, device=str(device)), kinds)[0].module()
        if chosen.rest == "inductor":
            from engines.torch_graph.compiled_rest import compiled_rest

            module = compiled_rest(module, device)
        kept = frozenset(declared.name for declared in manifest.adapters.weights) if manifest.adapters else frozenset[str]()
        return CudaSession(module, [declared.name for declared in manifest.graph_inputs], manifest.outputs, device, kept=kept)

    def at_sites(self, cut: SiteTestCase, engine: Manifest, device: torch.device) -> dict[str, Tensor]:
        """Run the unfused graph, cut at every site."""
        from engines.torch_graph import rewrite as rewriting
        from engines.torch_graph.packed_layer import integers

        kinds = code_formats_on(engine, device)
        tensors = _stored(cut.artifact, engine.plan, self.site_dtype(engine))
        rewritten, branches = _graph(engine, {name: value.to(device) for name, value in tensors.items()}, kinds, fused=False)
        dtype = self.site_dtype(engine)
        placed = rewriting.cut_at_layers(rewritten, set(branches.values()))
        inputs = {placeholder: cut.records[name].x.to(device, dtype) for name, placeholder in placed.items()}
        weights = [cut.adapter_values[name].to(device) for name in branches]
        codes, outputs = rewritten.module()(cut.timestep.to(device), *inputs.values(), *weights)
        rows = table_rows(cut.artifact.row_of_timestep, cut.timestep).to(device)
        results = {f"{name}.y": value for name, value in outputs.items()}
        for name, value in codes.items():
            table = cut.artifact.sites[name].activation
            assert table is not None  # a weight-only site has no codes
            results[f"{name}.codes"] = integers(value, kinds[name], table.qmin.to(device)[rows], cut.records[name].x)
        return results

    def site_dtype(self, engine: Manifest) -> torch.dtype:
        """Floating-point type between the sites: the kernels do not read float32."""
        return DTYPES[engine.build["options"]["precision"]]


BACKEND = CudaBackend()


def plan_with_reasons(artifact: Artifact, target: BackendCapabilities) -> tuple[dict[str, SitePlan], dict[str, str]]:
    """The plan of each site on a GPU with INT4 tensor cores, and the reason for each site that no integer kernel computes."""
    layers = artifact.family_object.sites(artifact.skeleton())
    plans = {name: site_plan(site, layers[name], target) for name, site in artifact.sites.items()}
    floats = {name for name, plan in plans.items() if plan.executed == "float" and artifact.sites[name].activation is not None}
    return plans, {name: str(unsupported_reason(layers[name], target.filters or ())) for name in plans if name in floats}


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


def _warnings(plans: Mapping[str, SitePlan], reasons: Mapping[str, str], gpu: str) -> tuple[str, ...]:
    warnings = [f"{site}: {reason}; exact codes, floating-point arithmetic." for site, reason in reasons.items()]
    weight_only = sum(plan.executed == "float" for plan in plans.values()) - len(reasons)
    if weight_only:
        warnings.append(f"{weight_only} sites quantize their weights only: floating-point arithmetic on weights dequantized when opened.")
    narrow = sum(plan.executed == "int4" for plan in plans.values())
    if narrow and not has_int4(gpu):
        warnings.append(f"{gpu} has no INT4 tensor cores: {narrow} sites whose codes fit 4 bits run as INT8.")
    return tuple(warnings)


def _stored(artifact: Artifact, plans: Mapping[str, SitePlan], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the engine's file: packed sites and every other parameter. One-dimensional ones stay float32, as norms and epilogues read them."""
    from engines.torch_graph.packed_layer import tensors_from_layer

    expected = {name: _stored_dtype(value, dtype) for name, value in artifact.skeleton().state_dict().items()}
    tensors = {f"{PARAMS}{name}": value.to(expected[name]) for name, value in artifact.params.items()}
    for name, site in artifact.sites.items():
        tensors |= tensors_from_layer(name, site, plans[name].codes)
    return {ROWS: artifact.row_of_timestep} | {name: value.contiguous() for name, value in tensors.items()}


def _stored_dtype(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.ndim > 1 and value.is_floating_point() else torch.float32


def _graph(
    manifest: Manifest, tensors: Mapping[str, Tensor], kinds: Mapping[str, CodeFormat | None], *, fused: bool = True
) -> tuple[GraphRewrite, dict[str, fx.Node]]:
    """The engine's graph with its tensors, on the device of the tensors; and the placeholders of its adapter branches by input."""
    from engines.torch_graph import fusions
    from engines.torch_graph import rewrite as rewriting
    from engines.torch_graph.adapters import add_adapters
    from engines.torch_graph.attention import attention_in_int8
    from engines.torch_graph.packed_layer import layer_from_tensors

    family, dtype = family_named(manifest.family), DTYPES[manifest.build["options"]["precision"]]
    structure = NetworkRewrite.from_json(manifest.structure)
    model = meta_model(family, manifest.config, structure)
    layers = family.sites(model)
    if unknown := sorted(set(manifest.sites) - set(layers)):
        raise ArtifactError(f"Site {unknown[0]!r} is no layer of the model. Build the engine again.")
    params = {name.removeprefix(PARAMS): value for name, value in tensors.items() if name.startswith(PARAMS)}
    floats = {name: value for name, value in model.state_dict().items() if name.removesuffix(".weight") not in manifest.sites}
    check_tensors(params, {name: (_stored_dtype(value, dtype), tuple(value.shape)) for name, value in floats.items()}, of="Parameters")
    sites = {
        name: layer_from_tensors(
            name,
            tensors,
            packed=manifest.plan[name].codes,
            kind=kinds[name],
            weight_shape=tuple(layers[name].weight.shape),
            bias=params.get(f"{name}.bias"),
            dtype=dtype,
        )
        for name in manifest.sites
    }
    rows = min((len(site.act_scale) for site in sites.values() if site.act_scale is not None), default=1 << 31)
    check_rows(tensors.get(ROWS, torch.zeros(0)), rows, manifest.num_train_timesteps)
    params |= {f"{name}.weight": site.weight for name, site in sites.items() if site.kind is None}
    program = exported_program(family, manifest.config, dtype, input_dtype=manifest.torch_dtype, structure=structure)
    rewritten = rewriting.rewrite_layers(program, sites, params, tensors[ROWS], dtype)
    for name, shape in manifest.adapters.layers.items() if manifest.adapters else ():
        if shape != tuple(layers[name].weight.shape):
            raise ArtifactError(
                f"adapters.layers[{name!r}] is {list(shape)}, the layer's weight {list(layers[name].weight.shape)}. Build the engine again."
            )
    branches = {} if manifest.adapters is None else add_adapters(rewritten, layers, manifest.adapters)
    if fused:
        fusions.fuse(rewritten)
        if GraphOptions.recorded(manifest.build["options"]).attention == "int8" and not attention_in_int8(rewritten):
            log.warning("--attention int8: this model has no attention that the kernels compute; all of it runs in floating point.")
    return rewritten, branches


def _adapters(artifact: Artifact, options: BuildOptions) -> AdapterInputs | None:
    if options.lora_rank is not None:
        return adapters_of(artifact, rank=options.lora_rank, pattern=options.lora_layers)
    if options.lora_layers is not None:
        raise InputError("--lora-layers names the layers of --lora-rank. Add --lora-rank, or leave --lora-layers out.")
    return None


def _refuse_foreign(manifest: Manifest) -> None:
    refuse_other_backend(manifest, CudaBackend.name)
    if manifest.build.get("layout") != LAYOUT:
        raise UnsupportedError(
            f"This engine's weights are packed in layout {manifest.build.get('layout')}; this edm-deploy reads {LAYOUT}. "
            "Build it again with edm-deploy build-engine --backend cuda."
        )
    if unknown := [name for name, plan in manifest.plan.items() if plan.codes not in (None, "s4", "u4", "s8")]:
        raise ArtifactError(
            f"Site {unknown[0]!r} has codes {manifest.plan[unknown[0]].codes!r}, which no kernel reads. Build the engine again."
        )

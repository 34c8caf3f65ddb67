"""The engine of our own kernels, on every device: one file of packed weights, written from an artifact and opened into the graph of the float model.

The graph is traced from the float model when the engine is opened, and rewritten for the kernels' operators (`engines/torch_graph/rewrite.py`). A backend
decides in which format each site runs, what is fused, and how the graph is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from edm_deploy.runtime.backend import BuildOptions, SiteTestCase
from edm_deploy.runtime.capabilities import BackendCapabilities, SitePlan, site_plan, unsupported_reason
from edm_deploy.runtime.manifest import Manifest
from engines.common.graph_checks import check_rows, check_tensors
from engines.common.vendor_package import refuse_other_backend

if TYPE_CHECKING:
    from torch import fx

    from engines.torch_graph.rewrite import GraphRewrite

ENGINE_NAME = "engine.safetensors"
PARAMS, ROWS = "params.", "row_of_timestep"  # names in the engine's file; those of a layer are packed_layer.tensor_name
LAYOUT = 1  # version of the packed weights; incremented when an older file would be misread
DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def plan_with_reasons(artifact: Artifact, target: BackendCapabilities) -> tuple[dict[str, SitePlan], dict[str, str]]:
    """The plan of each site by the backend's capabilities, and the reason for each site that no integer kernel computes."""
    layers = artifact.family_object.sites(artifact.skeleton())
    plans = {name: site_plan(site, layers[name], target) for name, site in artifact.sites.items()}
    floats = {name for name, plan in plans.items() if plan.executed == "float" and artifact.sites[name].activation is not None}
    return plans, {name: str(unsupported_reason(layers[name], target.filters or ())) for name in plans if name in floats}


def accepted_plan(artifact: Artifact, target: BackendCapabilities, options: BuildOptions) -> tuple[dict[str, SitePlan], tuple[str, ...]]:
    """The plan of each site, and warnings about the sites that are computed in floating point.

    Raises:
        UnsupportedError: No integer kernel computes a site with quantized input, and the options do not accept that.
    """
    plans, reasons = plan_with_reasons(artifact, target)
    if reasons and not options.allow_float_sites:
        site, reason = next(iter(reasons.items()))
        raise UnsupportedError(
            f"{len(reasons)} of {len(plans)} quantized sites have no integer kernel in {target.backend}; first {site!r}: {reason}. "
            "Accept exact codes with floating-point arithmetic there with --allow-float-sites, or build for openvino."
        )
    warnings = [f"{site}: {reason}; exact codes, floating-point arithmetic." for site, reason in reasons.items()]
    weight_only = sum(plan.executed == "float" for plan in plans.values()) - len(reasons)
    if weight_only:
        warnings.append(f"{weight_only} sites quantize their weights only: floating-point arithmetic on weights dequantized when opened.")
    return plans, tuple(warnings)


def requested_adapters(artifact: Artifact, options: BuildOptions) -> AdapterInputs | None:
    """The adapter branches of a build's options; None for none.

    Raises:
        InputError: Layers are named without a rank, or as `adapters_of`.
    """
    if options.lora_rank is not None:
        return adapters_of(artifact, rank=options.lora_rank, pattern=options.lora_layers)
    if options.lora_layers is not None:
        raise InputError("--lora-layers names the layers of --lora-rank. Add --lora-rank, or leave --lora-layers out.")
    return None


def write_engine(
    artifact: Artifact, plans: Mapping[str, SitePlan], dtype: torch.dtype, out: Path, *, adapters: AdapterInputs | None = None
) -> None:
    """Write the engine's file, each site packed as its plan states, and the factors that the adapter branches need.

    Args:
        artifact: Its sites and parameters are stored.
        plans: By site.
        dtype: Of the parameters with two dimensions or more.
        out: Directory.
        adapters: The adapter branches.
    """
    save_file(packed_tensors(artifact, plans, dtype), out / ENGINE_NAME)
    if adapters is not None and (factors := site_factors(artifact, adapters)):
        save_file(factors, out / FACTORS_NAME)


def packed_tensors(artifact: Artifact, plans: Mapping[str, SitePlan], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the engine's file: packed sites and every other parameter. One-dimensional ones stay float32, as norms and epilogues read them."""
    from engines.torch_graph.packed_layer import tensors_from_layer

    expected = {name: _stored_dtype(value, dtype) for name, value in artifact.skeleton().state_dict().items()}
    tensors = {f"{PARAMS}{name}": value.to(expected[name]) for name, value in artifact.params.items()}
    for name, site in artifact.sites.items():
        tensors |= tensors_from_layer(name, site, plans[name].codes)
    return {ROWS: artifact.row_of_timestep} | {name: value.contiguous() for name, value in tensors.items()}


def _stored_dtype(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.ndim > 1 and value.is_floating_point() else torch.float32


def site_dtype(engine: Manifest) -> torch.dtype:
    """Floating-point type between the sites: the kernels do not read float32."""
    return DTYPES[engine.build["options"]["precision"]]


def refuse_foreign(manifest: Manifest, backend: str) -> None:
    """Refuse an engine whose file this version of the backend does not read, before the file is opened.

    Raises:
        UnsupportedError: Another backend built it, or an edm-deploy with another layout of packed weights.
        ArtifactError: A site has a packing that no kernel reads.
    """
    refuse_other_backend(manifest, backend)
    if manifest.build.get("layout") != LAYOUT:
        raise UnsupportedError(
            f"This engine's weights are packed in layout {manifest.build.get('layout')}; this edm-deploy reads {LAYOUT}. "
            f"Build it again with edm-deploy build-engine --backend {backend}."
        )
    if unknown := [name for name, plan in manifest.plan.items() if plan.codes not in (None, "s4", "u4", "s8")]:
        raise ArtifactError(
            f"Site {unknown[0]!r} has codes {manifest.plan[unknown[0]].codes!r}, which no kernel reads. Build the engine again."
        )


def open_graph(
    manifest: Manifest, tensors: Mapping[str, Tensor], kinds: Mapping[str, CodeFormat | None]
) -> tuple[GraphRewrite, dict[str, fx.Node]]:
    """The engine's graph with its tensors, on the device of the tensors, not fused yet; and the placeholders of its adapter branches by input.

    Args:
        manifest: Of the engine.
        tensors: Of the engine's file.
        kinds: By site, the format in which it runs; `s8` widens weights that are packed in 4 bits. None where no kernel computes it.

    Raises:
        ArtifactError: The tensors are not those of the manifest's model.
    """
    from engines.torch_graph import rewrite as rewriting
    from engines.torch_graph.adapters import add_adapters
    from engines.torch_graph.packed_layer import layer_from_tensors

    family, dtype = family_named(manifest.family), site_dtype(manifest)
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
    return rewritten, {} if manifest.adapters is None else add_adapters(rewritten, layers, manifest.adapters)


def adapter_weights(manifest: Manifest) -> frozenset[str]:
    """Names of the graph's inputs that stay the same tensors until an adapter is loaded or removed."""
    return frozenset(declared.name for declared in manifest.adapters.weights) if manifest.adapters else frozenset()


def run_at_sites(
    cut: SiteTestCase,
    engine: Manifest,
    device: torch.device,
    kinds: Mapping[str, CodeFormat | None],
    run: Callable[[fx.GraphModule, Sequence[Tensor]], Any],
) -> dict[str, Tensor]:
    """What `Backend.at_sites` returns: the unfused graph of an engine with this plan, cut at every site.

    Args:
        cut: The test case.
        engine: Its plan and options are used, not its file.
        device: Where it runs.
        kinds: By site, as for `open_graph`.
        run: Executes the cut graph on its inputs, in order; returns codes and outputs by site.
    """
    from engines.torch_graph import rewrite as rewriting
    from engines.torch_graph.packed_layer import integers

    dtype = site_dtype(engine)
    tensors = packed_tensors(cut.artifact, engine.plan, dtype)
    rewritten, branches = open_graph(engine, {name: value.to(device) for name, value in tensors.items()}, kinds)
    placed = rewriting.cut_at_layers(rewritten, set(branches.values()))
    inputs = {placeholder: cut.records[name].x.to(device, dtype) for name, placeholder in placed.items()}
    weights = [cut.adapter_values[name].to(device) for name in branches]
    codes, outputs = run(rewritten.module(), [cut.timestep.to(device), *inputs.values(), *weights])
    rows = table_rows(cut.artifact.row_of_timestep, cut.timestep).to(device)
    results = {f"{name}.y": value for name, value in outputs.items()}
    for name, value in codes.items():
        table = cut.artifact.sites[name].activation
        assert table is not None  # a weight-only site has no codes
        results[f"{name}.codes"] = integers(value, kinds[name], table.qmin.to(device)[rows], cut.records[name].x)
    return results

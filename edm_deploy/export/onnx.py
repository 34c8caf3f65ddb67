"""Export an artifact as an ONNX directory: graph, manifest, and the files that rebuild the pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from safetensors.torch import save_file
from torch import Tensor

from edm_deploy.adapters.site_weights import FACTORS_NAME, site_factors
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.relaxed_timesteps import FOLDER, relaxed_graph
from edm_deploy.errors import InputError, UnsupportedError, first_line
from edm_deploy.export.adapters import insert_adapters
from edm_deploy.export.int4_plugin import insert_plugins, plugin_kinds
from edm_deploy.export.qdq import WeightStorage, insert_qdq, remove_float_weights
from edm_deploy.export.simplify import tidy
from edm_deploy.export.time_table import fold_time
from edm_deploy.export.trace import find_sites, trace
from edm_deploy.network.adapter_inputs import AdapterInputs
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.manifest import ONNX, TORCH_DTYPES, GraphDtype, Manifest
from edm_deploy.storage.directories import copy_pipeline_files
from edm_deploy.storage.output_directory import check_output, new_directory

DATA_NAME = "model.onnx.data"
Int4 = Literal["qdq", "plugin"]
FOLDED = "edm_deploy.folded"  # key of the graph's metadata
# A protobuf file is limited to 2 GiB, and writing it holds all weights in memory three times. Small graphs are a single file.
EXTERNAL_DATA_BYTES = 1 << 28


def onnx_from_artifact(
    artifact: Artifact,
    out: Path | str,
    *,
    dtype: GraphDtype = "fp32",
    weight_storage: WeightStorage = "int8",
    int4: Int4 = "qdq",
    adapters: AdapterInputs | None = None,
) -> Manifest:
    """Export an artifact to directory `out`, whole or not at all.

    An artifact with relaxed timesteps becomes two graphs of the same weights; the second is in the folder `relaxed`, with its own manifest.

    Args:
        artifact: A valid artifact.
        out: Directory to write: model.onnx, manifest.json and the pipeline's files.
        dtype: Floating-point type of the graph outside the quantized layers, which are float32 in any case.
        weight_storage: `int4` packs weight codes that fit in [-8, 7] two to a byte.
        int4: `plugin` writes sites whose codes fit 4 bits as nodes of this package's TensorRT plugins, which multiply 4-bit integers; only backend
            `trt` builds such a graph. `qdq` is standard ONNX for any backend, where 4-bit codes are computed as INT8.
        adapters: Branches whose weights are inputs of the graph, from `edm_deploy.adapters.site_weights.adapters_of`; None for none.

    Returns:
        The manifest that was written.

    Raises:
        InputError: A dtype or weight_storage other than these, or a combination that `int4` excludes.
        UnsupportedError: torch cannot trace the model, or the plugins can compute none of its sites.
        ArtifactError: `out` holds something else or cannot be written.
    """
    if dtype not in TORCH_DTYPES or weight_storage not in ("int8", "int4"):
        raise InputError(f"dtype {dtype!r}, weight storage {weight_storage!r}: expected fp32 or fp16, int8 or int4.")
    if int4 == "plugin" and dtype != "fp16":
        raise InputError(f"--int4 plugin: the plugins compute in float16, and the graph is {dtype}. Add --dtype fp16.")
    if int4 == "plugin" and weight_storage != "int8":
        raise InputError("--weight-storage int4 with --int4 plugin: plugin nodes always store packed weights. Leave --weight-storage out.")
    check_output(Path(out), kind=ONNX)
    plugins = plugin_kinds(artifact) if int4 == "plugin" else None
    traced = trace(artifact.family_object, artifact.config, TORCH_DTYPES[dtype], artifact.structure)
    return _export(artifact, traced, Path(out), dtype, weight_storage, plugins, adapters)


def _export(
    artifact: Artifact,
    traced: ir.Model,
    out: Path,
    dtype: GraphDtype,
    weight_storage: WeightStorage,
    plugins: Mapping[str, CodeFormat] | None,
    adapters: AdapterInputs | None,
) -> Manifest:
    # Of two graphs, the second is rewritten from a copy: tracing is nine tenths of an export's work.
    second = None if artifact.relaxed is None else traced.clone()
    model, site_nodes = _quantized(artifact, traced, TORCH_DTYPES[dtype], weight_storage, plugins, adapters)
    manifest = Manifest.of(artifact, site_nodes, kind="onnx", dtype=dtype, weight_storage=weight_storage, plugins=plugins)
    manifest = replace(manifest, adapters=adapters)
    manifest = replace(manifest, folded=json.loads(model.metadata_props[FOLDED]))
    with new_directory(out, kind=ONNX) as directory:
        files = save_graph(model, directory)
        copy_pipeline_files(artifact.pipeline, directory)
        files += artifact.pipeline
        if adapters is not None and (factors := site_factors(artifact, adapters)):
            save_file(factors, directory / FACTORS_NAME)
            files.append(FACTORS_NAME)
        if second is not None:
            # Without plugin nodes, which multiply 4-bit integers: its inputs have 8 bits or are in floating point.
            _export(relaxed_graph(artifact), second, directory / FOLDER, dtype, weight_storage, None, adapters)
            files += [path.relative_to(directory).as_posix() for path in (directory / FOLDER).rglob("*") if path.is_file()]
        return manifest.write(directory, files)


def graph_from_artifact(
    artifact: Artifact, dtype: torch.dtype, storage: WeightStorage, adapters: AdapterInputs | None = None
) -> tuple[ir.Model, dict[str, str]]:
    """The simplified Q/DQ graph of an artifact, and the node name of each site."""
    traced = trace(artifact.family_object, artifact.config, dtype, artifact.structure)
    return _quantized(artifact, traced, dtype, storage, None, adapters)


def _quantized(
    artifact: Artifact,
    model: ir.Model,
    dtype: torch.dtype,
    storage: WeightStorage,
    plugins: Mapping[str, CodeFormat] | None,
    adapters: AdapterInputs | None,
) -> tuple[ir.Model, dict[str, str]]:
    """As `graph_from_artifact`, from its float graph as `trace` returns it, which is rewritten in place."""
    # Before any optimisation: the name of a fused node does not lead to its parameter.
    sites = find_sites(model.graph, list(artifact.sites))
    folded = fold_time(model, artifact, [node for site in sites.values() for node in site.dead])
    if adapters is not None:
        insert_adapters(model, sites, adapters)
    site_nodes = insert_qdq(model, artifact, sites, storage) if plugins is None else insert_plugins(model, artifact, sites, plugins)
    remove_float_weights(model.graph, artifact.sites)
    _fill_parameters(model.graph, artifact, dtype)
    passes.TopologicalSortPass()(model)  # a shared input is inserted before its first user only
    tidy(model)
    model.producer_name = "edm-deploy"
    model.metadata_props["edm_deploy.artifact"] = artifact.digest
    model.metadata_props[FOLDED] = json.dumps(folded)
    remaining = {node.name for node in model.graph}
    if lost := sorted(set(site_nodes.values()) - remaining):
        raise UnsupportedError(f"Graph optimisation removed {lost[0]!r}, a quantized layer. Please report this with the model's config.")
    return model, site_nodes


def save_graph(model: ir.Model, directory: Path) -> list[str]:
    """Write and check the graph; returns the names of the files. Weights above EXTERNAL_DATA_BYTES are written to a second file."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = DATA_NAME if size > EXTERNAL_DATA_BYTES else None
    path = directory / GRAPH_NAME
    ir.save(model, path, external_data=external)
    try:
        onnx.checker.check_model(path, full_check=external is None)
        if external:  # the full check would read all data, which types and shapes do not need
            onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise UnsupportedError(
            f"The exported graph is not valid ONNX: {first_line(err)}. Please report this with the model's config."
        ) from err
    return [GRAPH_NAME] + ([DATA_NAME] if external else [])


def _fill_parameters(graph: ir.Graph, artifact: Artifact, dtype: torch.dtype) -> None:
    """Assign the artifact's values to the float graph's remaining initialisers."""
    for name, value in graph.initializers.items():
        if name in artifact.params:
            value.const_value = _lazy(name, artifact.params[name], dtype)


def _lazy(name: str, param: Tensor, dtype: torch.dtype) -> ir.TensorProtocol:
    """A parameter that is converted when it is written, without keeping the result."""
    dtype = dtype if param.is_floating_point() else param.dtype
    kind = ir.tensor(torch.zeros(0, dtype=dtype).numpy()).dtype
    return ir.LazyTensor(lambda: ir.tensor(param.to(dtype).numpy(), name=name), dtype=kind, shape=ir.Shape(param.shape), name=name)

"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


def export(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="Directory written by calibrate or finetune; or a float model, which stays float.")
    ],
    out: opt.Out,
    file_format: Annotated[opt.Format, typer.Option("--format", help="Output format.")] = opt.Format.ONNX,
    dtype: Annotated[opt.FloatType, typer.Option(help="Floating-point type of the graph.")] = opt.FloatType.FP32,
    weight_storage: Annotated[
        opt.Storage, typer.Option(help="Type of the stored weight codes; int4 packs two to a byte, if the backend reads that.")
    ] = opt.Storage.INT8,
    backend: opt.For = None,
    int4: Annotated[
        opt.Int4, typer.Option(help="4-bit sites as Q/DQ nodes, or as TensorRT plugin nodes (plugin, with --for trt --dtype fp16).")
    ] = opt.Int4.QDQ,
    lora_rank: opt.LoraRank = None,
    lora_layers: opt.LoraLayers = None,
    lora: opt.Loras = None,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="For triton: name of the denoiser's model; the pipeline's is NAME_pipeline.")
    ] = "denoiser",
    overwrite: opt.Overwrite = False,
) -> None:
    """Export ARTIFACT as a standard ONNX graph (opset 21) that contains the activation tables. --lora adds a LoRA for good.

    With --format triton: a model repository of NVIDIA Triton Inference Server, from an artifact, an ONNX directory or an engine; --for is the backend.
    With --format polygraphy: the graph with inputs, reference outputs and commands for NVIDIA's Polygraphy, from an artifact.
    """
    if file_format is not opt.Format.ONNX:
        given = {"--weight-storage": weight_storage is not opt.Storage.INT8, "--int4": int4 is not opt.Int4.QDQ}
        given |= {"--lora-rank": lora_rank, "--lora-layers": lora_layers, "--lora": lora}
        if file_format is opt.Format.TRITON:
            given = {"--dtype": dtype is not opt.FloatType.FP32} | given
            export_triton(artifact, out, name, backend, [option for option, chosen in given.items() if chosen], overwrite)
        else:
            given |= {"--for": backend}
            export_polygraphy(artifact, out, dtype.value, [option for option, chosen in given.items() if chosen], overwrite)
        return
    from edm_deploy.export.onnx import onnx_from_artifact
    from edm_deploy.runtime.capabilities import capabilities_of, check_plugins, check_storage
    from edm_deploy_tools.benchmarks.float_engine import artifact_or_float
    from edm_deploy_tools.common.loras import branches_for, fused

    opt.check_new(out, overwrite)
    target = capabilities_of(backend) if backend else None
    check_plugins(target, int4 is opt.Int4.PLUGIN)
    if target is not None:
        check_storage(target, weight_storage.value)
    content = fused(artifact_or_float(artifact), lora or ())
    manifest = onnx_from_artifact(
        content,
        out,
        dtype=dtype.value,
        weight_storage=weight_storage.value,
        int4=int4.value,
        adapters=branches_for(content, lora_rank, lora_layers),
    )
    console.wrote(
        out, f"ONNX directory, {manifest.scheme}, {manifest.dtype}, weights {manifest.weight_storage}, {len(manifest.sites)} sites"
    )
    if manifest.adapters:
        console.say(f"{len(manifest.adapters.layers)} layers take LoRAs at run time, of rank {manifest.adapters.rank} together.")
    if manifest.folded:
        result = (
            f"became a table, {manifest.folded['table']}" if "table" in manifest.folded else f"stay computed: {manifest.folded['computed']}"
        )
        console.say(f"{len(manifest.folded['layers'])} layers that depend on the timestep alone {result}.")
    if plugins := len(manifest.plugin_sites):
        console.say(f"{plugins} sites are INT4 plugin nodes, the others Q/DQ: this graph is for build-engine --backend trt only.")


def export_triton(source: Path, out: Path, name: str, backend: str | None, given: list[str], overwrite: bool) -> None:
    """Write a Triton model repository; options of the graph belong to the export that comes before."""
    from edm_deploy.errors import InputError
    from edm_deploy_tools.triton.repository import write_repository

    if given:
        raise InputError(
            f"{given[0]} decides the graph, and --format triton takes a graph as it is. Export to ONNX with it, then that directory."
        )
    opt.check_new(out, overwrite)
    written = write_repository(source, out, name=name, backend=backend)
    models = " and ".join(filter(None, (written.denoiser, written.pipeline)))
    console.wrote(out, f"Triton model repository with {models}")
    if written.reason:
        console.say(f"Note: no model of the denoiser alone: {written.reason}. {written.pipeline} runs it as our runtime does.")


def export_polygraphy(source: Path, out: Path, dtype: Literal["fp32", "fp16"], given: list[str], overwrite: bool) -> None:
    """Write a folder for Polygraphy, whose graph has the plain form that TensorRT reads."""
    from edm_deploy.artifact.artifact import Artifact
    from edm_deploy.errors import InputError
    from edm_deploy_tools.inspection.polygraphy_folder import README, write_polygraphy_folder

    if given:
        raise InputError(f"{given[0]} is not for --format polygraphy, whose graph is in Q/DQ nodes with INT8 weights. Leave it out.")
    opt.check_new(out, overwrite)
    written = write_polygraphy_folder(Artifact.load(source), out, dtype=dtype)
    console.wrote(out, f"folder for Polygraphy; its commands are in {README}")
    if written.sites is None:
        console.say(f"Note: no folder of single layers, whose inputs and outputs would take {written.site_bytes / 1e6:.0f} MB.")

"""The command `build-engine`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edm_deploy_tools.common import console, cuda_options
from edm_deploy_tools.common import options as opt


class OrtProvider(StrEnum):
    """What ONNX Runtime runs on."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


def build_engine(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Directory written by export; for cuda and cpu the artifact.")],
    out: opt.Out,
    backend: Annotated[str, typer.Option(help="ort, openvino, trt-rtx or trt, from ONNX; cuda or cpu, from the artifact.")],
    gpu: Annotated[
        str | None, typer.Option(help="GPU to build for (trt-rtx, cuda): rtx3090, rtx4090, sm_86, ...; several with commas.")
    ] = None,
    batch: Annotated[str | None, opt.Profile] = None,
    height: Annotated[str | None, opt.Profile] = None,
    width: Annotated[str | None, opt.Profile] = None,
    tokens: Annotated[str | None, opt.Profile] = None,
    image_tokens: Annotated[str | None, opt.Profile] = None,
    precision: Annotated[
        str | None, typer.Option(help="Floating-point type of everything except the quantized layers: fp32, bf16 or fp16.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: the backend's.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="Effort of the TensorRT builder, 0 to 5. Default: TensorRT's.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(metavar="FILE", help="TensorRT timing cache to read and extend.")] = None,
    workspace_mib: Annotated[int | None, typer.Option(metavar="MIB", help="Limit of TensorRT's scratch memory in MiB.")] = None,
    int4_where: cuda_options.Int4Where = None,
    rest: cuda_options.Rest = None,
    attention: cuda_options.Attention = None,
    provider: Annotated[
        OrtProvider | None,
        typer.Option(
            help="For ort: what ONNX Runtime runs on; cuda and tensorrt need edm-deploy[ort-gpu]. Default: its own CPU or CUDA kernels."
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="For ort on a GPU: capture a run once and replay it; every dimension then has one size.")
    ] = False,
    allow_float_sites: Annotated[
        bool, typer.Option("--allow-float-sites", help="Accept quantized sites that no integer layer computes.")
    ] = False,
    with_pipeline: Annotated[
        bool,
        typer.Option("--with-pipeline", help="Copy text encoders, tokenizers and VAE into the engine's directory, so that it is complete."),
    ] = False,
    components: Annotated[
        str | None,
        typer.Option("--source", metavar="MODEL", help="Pipeline that --with-pipeline copies from. Default: the model that was quantized."),
    ] = None,
    lora_rank: opt.LoraRank = None,
    lora_layers: opt.LoraLayers = None,
    lora: opt.Loras = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Build an engine for one backend. trt-rtx and cuda build for a named GPU on a machine that has none.

    The three options for LoRA are for cuda and cpu; other backends build from a graph, and export has them.
    """
    from edm_deploy.runtime.capabilities import summary
    from edm_deploy_tools.common.build_options import build, build_options, pipeline_to_copy
    from edm_deploy_tools.common.loras import source_with_loras

    opt.check_new(out, overwrite)
    sizes = {"batch": batch, "height": height, "width": width, "tokens": tokens, "image_tokens": image_tokens}
    others: dict[str, Any] = {"gpu": gpu, "precision": precision, "threads": threads, "optimization_level": optimization_level}
    others |= {"timing_cache": timing_cache, "workspace_mib": workspace_mib, "allow_float_sites": allow_float_sites}
    others |= {"int4_where": opt.value(int4_where), "rest": opt.value(rest), "attention": opt.value(attention)}
    others |= {"lora_rank": lora_rank, "lora_layers": lora_layers}
    others |= {"provider": opt.value(provider), "cuda_graphs": cuda_graphs or None}
    pipeline = pipeline_to_copy(source, with_pipeline, components)
    with source_with_loras(source, backend, lora or ()) as content:
        manifest = build(content, out, backend=backend, options=build_options(sizes, others), pipeline=pipeline)
    for warning in manifest.build.get("warnings", []):
        console.say(f"Note: {warning}")
    console.say(f"Plan: {summary(manifest.plan)}")
    if manifest.adapters:
        console.say(f"{len(manifest.adapters.layers)} layers take LoRAs at run time, of rank {manifest.adapters.rank} together.")
    console.wrote(out, f"{manifest.backend} engine, {manifest.scheme}{', with the rest of its pipeline' if with_pipeline else ''}")

"""The command line `edm-deploy`. Each command parses its options, calls one function and prints the result."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edm_deploy_tools.commands import options as opt
from edm_deploy_tools.commands.compare import compare
from edm_deploy_tools.commands.quantize import calibrate, finetune
from edm_deploy_tools.commands.sample_evaluate import evaluate, sample
from edm_deploy_tools.common import console, run_app

if TYPE_CHECKING:
    from edm_deploy_tools.benchmarks.engines import Bench
    from edm_deploy_tools.benchmarks.finetune_step import TrainingCost

# Nothing that imports torch, diffusers or a backend is imported outside the functions, so that `--help` is fast.

app = run_app.app_with(no_args_is_help=True, add_completion=True, rich_markup_mode="rich")


def print_version(requested: bool) -> None:
    """Print the version and exit, if `--version` is given."""
    if requested:
        console.say(f"edm-deploy {importlib.metadata.version('edm-deploy')}")
        raise typer.Exit


@app.callback()
def prepare(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Quantize diffusion models to 4 to 8 bits, build engines of them, sample images, and measure the error and the speed."""
    if context.invoked_subcommand != "bench":  # float baselines are timed with torch's default threading
        run_app.set_passive_openmp()


app.command(epilog=opt.example("calibrate google/ddpm-cifar10-32 --out ddpm-w8a8"))(calibrate)
app.command(epilog=opt.example("finetune google/ddpm-cifar10-32 --out ddpm-w4a4 --set steps=2000 --for openvino"))(finetune)


app.command(epilog=opt.example("compare google/ddpm-cifar10-32 --recipes static,mse,efficientdm --bits W4A4 --budget 5m --out compared"))(
    compare
)


@app.command(epilog=opt.example("export ddpm-w4a4 --out ddpm-w4a4-onnx --weight-storage int4"))
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
) -> None:
    """Export ARTIFACT as a standard ONNX graph (opset 21) that contains the activation tables."""
    from edm_deploy.export.onnx import onnx_from_artifact
    from edm_deploy.runtime.capabilities import capabilities_of, check_plugins, check_storage
    from edm_deploy_tools.benchmarks.float_engine import artifact_or_float

    target = capabilities_of(backend) if backend else None
    check_plugins(target, int4 is opt.Int4.PLUGIN)
    if target is not None:
        check_storage(target, weight_storage.value)
    manifest = onnx_from_artifact(artifact_or_float(artifact), out, dtype=dtype.value, weight_storage=weight_storage.value, int4=int4.value)
    console.wrote(
        out, f"ONNX directory, {manifest.scheme}, {manifest.dtype}, weights {manifest.weight_storage}, {len(manifest.sites)} sites"
    )
    if manifest.folded:
        result = (
            f"became a table, {manifest.folded['table']}" if "table" in manifest.folded else f"stay computed: {manifest.folded['computed']}"
        )
        console.say(f"{len(manifest.folded['layers'])} layers that depend on the timestep alone {result}.")
    if plugins := len(manifest.plugin_sites):
        console.say(f"{plugins} sites are INT4 plugin nodes, the others Q/DQ: this graph is for build-engine --backend trt only.")


@app.command(
    name="build-engine", epilog=opt.example("build-engine ddpm-w4a4-onnx --out engine --backend trt-rtx --gpu rtx3090 --batch 1:16:32")
)
def build_engine(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Directory written by export; for cuda the artifact.")],
    out: opt.Out,
    backend: Annotated[str, typer.Option(help="ort, openvino, trt-rtx or trt, from ONNX; cuda, from the artifact.")],
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
    int4_where: opt.Int4Where = None,
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
) -> None:
    """Build an engine for one backend. trt-rtx and cuda build for a named GPU on a machine that has none."""
    from edm_deploy.runtime.capabilities import summary
    from edm_deploy_tools.common.build_options import build, build_options, pipeline_to_copy

    sizes = {"batch": batch, "height": height, "width": width, "tokens": tokens, "image_tokens": image_tokens}
    others: dict[str, Any] = {"gpu": gpu, "precision": precision, "threads": threads, "optimization_level": optimization_level}
    others |= {"timing_cache": timing_cache, "workspace_mib": workspace_mib, "allow_float_sites": allow_float_sites}
    others["int4_where"] = opt.value(int4_where)
    pipeline = pipeline_to_copy(source, with_pipeline, components)
    manifest = build(source, out, backend=backend, options=build_options(sizes, others), pipeline=pipeline)
    for warning in manifest.build.get("warnings", []):
        console.say(f"Note: {warning}")
    console.say(f"Plan: {summary(manifest.plan)}")
    console.wrote(out, f"{manifest.backend} engine, {manifest.scheme}{', with the rest of its pipeline' if with_pipeline else ''}")


app.command(epilog=opt.example('sample engine --out images --prompt "a red bicycle" --guidance 6 --scheduler dpm-solver++'))(sample)
app.command(epilog=opt.example("evaluate ddpm-w4a4 engine --out report --reference google/ddpm-cifar10-32"))(evaluate)


@app.command(epilog=opt.example("bench engine-ort engine-openvino --against torch,torch-bf16 --batch 16"))
def bench(
    engines: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ENGINE_DIR...", help="Directories written by build-engine; those that cannot run here are skipped."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(help="Float baselines, separated by commas: torch, torch-bf16, torch-fp16, openvino-fp32, openvino-bf16, ort-fp32."),
    ] = "torch",
    batch: Annotated[int, typer.Option(help="Samples per call.")] = 16,
    rounds: Annotated[int, typer.Option(help="Measurements of each engine and baseline, made alternately.")] = 20,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch. Default: all cores.")] = None,
    finetune_step: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure one fine-tuning step of this model instead of engines.")
    ] = None,
    device: opt.EngineDevice = None,
    as_json: opt.Json = False,
) -> None:
    """Time engines and float baselines alternately in one process; prints medians and speed ratios."""
    from edm_deploy.errors import InputError

    result: Bench | TrainingCost
    if finetune_step:
        from edm_deploy_tools.benchmarks.finetune_step import bench_finetune_step

        if engines or device:
            raise InputError("--finetune-step measures a training step on the CPU, without engines or --device. Leave them or it out.")
        result = bench_finetune_step(finetune_step, batch=batch, rounds=rounds, threads=threads)
    else:
        from edm_deploy_tools.benchmarks.engines import bench_engines

        result = bench_engines(
            engines or [],
            against=[name for name in against.split(",") if name],
            batch=batch,
            rounds=rounds,
            threads=threads,
            device=opt.value(device),
        )
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_facts(result.conditions)
    console.print_table("Medians of alternating measurements", result.rows())


@app.command(epilog=opt.example("inspect ddpm-w4a4 --gpu rtx3090"))
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A model, a published architecture such as sd15 or sdxl, an artifact, an ONNX directory or an engine."
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="Add expected times on this GPU: rtx3090, rtx4090, a100 or h200.")] = None,
    batch: Annotated[str, typer.Option(help="Samples per call, for --gpu; several numbers with commas.")] = "1,8",
    top: Annotated[int, typer.Option(help="Largest number of sites to print.")] = 40,
    as_json: opt.Json = False,
) -> None:
    """Print what PATH is and contains. For a model, also what each backend would make of it, without reading its weights."""
    from edm_deploy_tools.inspection.describe import describe, longest

    description, rooflines = describe(path), []
    if gpu:
        from edm_deploy_tools import roofline

        rooflines = roofline.rooflines_of(path, gpu, batch)
    if as_json:
        console.print_json(vars(description) | ({"rooflines": [roofline.to_json(entry) for entry in rooflines]} if gpu else {}))
        return
    console.print_facts(description.facts)
    for title, rows in description.tables.items():
        console.print_table(*longest(title, rows, top))
    if gpu:
        roofline.show(rooflines, top)


@app.command(epilog=opt.example("demo --bits W4A8"))
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for all results.")] = Path("demo"),
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, such as W4A4 or W4A8.")] = "W4A4",
) -> None:
    """Quantize, export, build, sample and evaluate the shipped model, in about ten minutes on two cores. Run again to continue."""
    from edm_deploy_tools.commands.demo import run_demo

    run_demo(out, bits)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of `run_app.run`."""
    return run_app.run(app, "edm-deploy", arguments)


if __name__ == "__main__":
    sys.exit(main())

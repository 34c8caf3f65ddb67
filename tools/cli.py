"""The command line `edm-deploy`. Each command parses its options, calls one function and prints the result."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.commands.bench import bench
from edm_deploy_tools.commands.bench_serve import bench_serve
from edm_deploy_tools.commands.build_engine import build_engine
from edm_deploy_tools.commands.compare import compare
from edm_deploy_tools.commands.evaluate import evaluate
from edm_deploy_tools.commands.export import export
from edm_deploy_tools.commands.generate import generate
from edm_deploy_tools.commands.inspect_path import inspect
from edm_deploy_tools.commands.quantize import calibrate, finetune
from edm_deploy_tools.commands.sample import sample
from edm_deploy_tools.commands.serve import serve
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common import options as opt

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


COMMANDS = (  # in the order of `--help`, each with its example
    (calibrate, "calibrate google/ddpm-cifar10-32 --out ddpm-w8a8"),
    (finetune, "finetune google/ddpm-cifar10-32 --out ddpm-w4a4 --set steps=2000 --for openvino"),
    (compare, "compare google/ddpm-cifar10-32 --recipes static,mse,efficientdm --bits W4A4 --budget 5m --out compared"),
    (export, "export ddpm-w4a4 --out ddpm-w4a4-onnx --weight-storage int4"),
    (build_engine, "build-engine ddpm-w4a4-onnx --out engine --backend trt-rtx --gpu rtx3090 --batch 1:16:32"),
    (sample, 'sample engine --out images --prompt "a red bicycle" --guidance 6 --scheduler dpm-solver++'),
    (generate, "generate engine --num-images 10000 --out generated --workers 2 --steps 50"),
    (serve, "serve engine --port 8000 --slots 8"),
    (evaluate, "evaluate ddpm-w4a4 engine --out report --reference google/ddpm-cifar10-32"),
    (bench, "bench engine-ort engine-openvino --against torch,torch-bf16 --batch 16"),
    (bench_serve, "bench-serve engine-openvino --slots 8 --requests 200 --rounds 3"),
    (inspect, "inspect ddpm-w4a4 --gpu rtx3090"),
)
for function, example in COMMANDS:
    app.command(name=example.split()[0], epilog=opt.example(example))(function)


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

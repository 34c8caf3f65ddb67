"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    overwrite: opt.Overwrite = False,
) -> None:
    """Export ARTIFACT as a standard ONNX graph (opset 21) that contains the activation tables."""
    from edm_deploy.export.onnx import onnx_from_artifact
    from edm_deploy.runtime.capabilities import capabilities_of, check_plugins, check_storage
    from edm_deploy_tools.benchmarks.float_engine import artifact_or_float

    opt.check_new(out, overwrite)
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

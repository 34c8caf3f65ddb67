"""The command `inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A model, a published architecture such as sd15 or sdxl, an artifact, an ONNX directory or an engine."
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="Add expected times on this GPU: rtx3090, rtx4090, a100 or h200.")] = None,
    batch: Annotated[str, typer.Option(help="Samples per call, for --gpu; several numbers with commas.")] = "1,8",
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="For a model: measure the error of the W4A4 prediction, and what of it 8 bits at each site remove. Reads the weights and calibrates.",
        ),
    ] = False,
    top: Annotated[int, typer.Option(help="Largest number of sites to print.")] = 40,
    as_json: opt.Json = False,
) -> None:
    """Print what PATH is and contains. For a model, also what each backend would make of it, without reading its weights."""
    from edm_deploy_tools.inspection.describe import describe, longest

    description, rooflines = describe(path), []
    if sensitivity:
        from edm_deploy_tools.inspection.sensitivity import with_sensitivity

        description = with_sensitivity(description, path)
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

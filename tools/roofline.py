"""Expected time of a model's layers on a GPU in float16, INT8 and INT4: the bound of each layer, and where INT4 is faster than INT8.

All times are expected, from engines/performance/roofline.py; nothing is measured.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.network.adapter_inputs import MAX_RANK
from edm_deploy.network.family import Family
from edm_deploy.network.layer_costs import ModelWork, SiteWork, model_work
from edm_deploy.runtime.capabilities import code_format as codes_of
from edm_deploy_tools.benchmarks.traced_step import TracedModel, show_steps, step_rows
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.inspection.describe import kind_of
from edm_deploy_tools.inspection.describe_model import pipeline_config_of
from engines.performance.gpus import Gpu, gpu_named
from engines.performance.roofline import MAIN_LOOP, Expected, Matmul, Precision, expected, faster_as_int8, others

NOTE = (
    "Expected, not measured. Only layers, their branches and the matmuls of attention: norms, additions and data movement add to this (--step). "
    "Assumes kernels as efficient as CUTLASS's; engines/profiles/measured.toml has the errors of this model."
)


@dataclass(frozen=True, kw_only=True)
class ModelLayers:
    """The layers of a model for a roofline.

    Attributes:
        name: Name that the user gave.
        work: Work of the layers.
        four_bit: Sites that INT4 kernels can compute.
    """

    name: str
    work: ModelWork
    four_bit: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """One model on one GPU at one batch size.

    Attributes:
        layers: The model.
        gpu, batch: The GPU, and samples per call.
        fused: Whether quantization is part of the preceding kernel.
        sites: Expected times by site and precision; INT4 only if the site's codes fit.
        outside: Seconds of the matmuls of attention and of float branches, in float16.
        as_int8: Sites that could run in INT4 but are no slower in INT8.
    """

    layers: ModelLayers
    gpu: Gpu
    batch: int
    fused: bool
    sites: Mapping[str, Mapping[Precision, Expected]]
    outside: float
    as_int8: frozenset[str]

    def chosen(self, site: str, precision: Precision) -> Expected:
        """Expected time of a site in precision `precision`, or in INT8 if it cannot run in that."""
        times = self.sites[site]
        return times.get(precision, times["int8"])

    def fastest(self, site: str) -> Expected:
        """Expected time of a site in INT4 if that is faster, else in INT8."""
        return self.chosen(site, "int8" if site in self.as_int8 else "int4")

    def times_by_precision(self) -> dict[str, list[Expected]]:
        """Expected times of the layers for each choice of precision."""
        return {
            "float16": [self.chosen(site, "float16") for site in self.sites],
            "INT8": [self.chosen(site, "int8") for site in self.sites],
            "INT4": [self.chosen(site, "int4") for site in self.sites],
            "INT4 where faster": [self.fastest(site) for site in self.sites],
        }


def layers_of(path_or_name: str) -> ModelLayers:
    """Layers of a float model as if quantized to W4A4, or of an artifact with its schemes.

    Raises:
        InputError: The path is an ONNX directory or an engine.
        ArtifactError, UnsupportedError: The model or artifact is damaged, or there is no family for it.
    """
    kind = kind_of(path_or_name)
    if kind == "artifact":
        artifact = Artifact.load(Path(path_or_name))
        work = _sites_only(model_work(artifact.family_object, artifact.config, artifact.structure), artifact.sites)
        four = frozenset(name for name, site in artifact.sites.items() if site.activation and codes_of(site) != "s8")
        return ModelLayers(name=path_or_name, work=work, four_bit=four)
    if kind != "model":
        raise InputError(f"{path_or_name} is an {kind} directory; expected a model, an architecture's name or an artifact.")
    pipeline = pipeline_config_of(path_or_name)
    family = pipeline.family_object
    work = model_work(family, pipeline.config)
    return ModelLayers(name=pipeline.name, work=work, four_bit=_quantized(family, work))


def roofline(layers: ModelLayers, gpu: Gpu, batch: int, *, fused: bool = False) -> Roofline:
    """Expected times of every site at one batch size.

    Raises:
        InputError: The batch is below 1.
    """
    if batch < 1:
        raise InputError(f"--batch {batch}: expected 1 or more.")

    def times(name: str, site: SiteWork) -> dict[Precision, Expected]:
        precisions: tuple[Precision, ...] = ("float16", "int8", "int4") if name in layers.four_bit and gpu.has_int4 else ("float16", "int8")
        matmul, first = Matmul.of(site, batch), layers.work.shared_input[name] == name
        return {precision: expected(matmul, precision, gpu, fused_quantize=fused, quantize=first) for precision in precisions}

    four = {name: site for name, site in layers.work.sites.items() if name in layers.four_bit}
    return Roofline(
        layers=layers,
        gpu=gpu,
        batch=batch,
        fused=fused,
        sites={name: times(name, site) for name, site in layers.work.sites.items()},
        outside=2 * batch * layers.work.other_macs / (gpu.peak("float16") * MAIN_LOOP)
        + sum(others(Matmul.of(layer, batch), "float16", gpu).seconds for layer in layers.work.branches.values()),
        as_int8=faster_as_int8(four, gpu, batch, fused_quantize=fused),
    )


def site_rows(roof: Roofline) -> list[Row]:
    """One row for each site, the slowest first."""
    rows: list[Row] = []
    for name in sorted(roof.sites, key=lambda name: -roof.fastest(name).seconds):
        times, best = roof.sites[name], roof.fastest(name)
        row: dict[str, Any] = {"site": name, "bound by": best.bound, "tile": "{}x{}".format(*best.tile), "splits": best.splits}
        for precision in ("float16", "int8", "int4"):
            row[f"{precision} us"] = round(1e6 * times[precision].seconds, 2) if precision in times else None
        rows.append(row | {"best": best.precision, "over float16": round(times["float16"].seconds / best.seconds, 2)})
    return rows


def total_rows(roof: Roofline) -> list[Row]:
    """One row for each choice of precision: time of the layers of one step, and of the step with branches and the matmuls of attention."""
    rows: list[Row] = []
    for name, times in roof.times_by_precision().items():
        layers = sum(time.seconds for time in times)
        spent: Counter[str] = Counter()
        for time in times:
            spent.update(time.parts)
        rows.append(
            {
                "precision": name,
                "layers ms": round(1e3 * layers, 3),
                "step ms": round(1e3 * (layers + roof.outside), 3),
                "over float16": round((rows[0]["step ms"] if rows else 1e3 * (layers + roof.outside)) / (1e3 * (layers + roof.outside)), 2),
                "quantize %": round(100 * sum(time.quantize_seconds for time in times) / layers, 1),
                **{f"{bound} %": round(100 * spent[bound] / layers, 1) for bound in ("tensor cores", "L2", "DRAM", "launch")},
            }
        )
    return rows


def facts_of(roof: Roofline) -> dict[str, Any]:
    """Model, GPU, batch and assumptions of the tables, and a summary."""
    return {
        "model": roof.layers.name,
        "GPU": f"{roof.gpu.title} ({roof.gpu.sm})" + ("" if roof.gpu.has_int4 else ", without INT4 tensor cores: 4 bits run as INT8"),
        "batch": roof.batch,
        "quantization": "in the preceding kernel" if roof.fused else "in a separate kernel",
        "advice": advice(roof),
        "note": NOTE,
    }


def advice(roof: Roofline) -> str:
    """Where INT4 is faster, in a sentence."""
    four = roof.layers.four_bit
    if not four:
        return "no site has 4-bit codes; INT8 throughout"
    if not roof.gpu.has_int4:
        return "INT8 throughout; 4 bits save memory only"
    words = [f"INT4 is faster at {len(four) - len(roof.as_int8)} of the {len(four)} sites whose codes fit"]
    if roof.as_int8:
        words.append(f"INT8 is no slower at the other {len(roof.as_int8)}")
    slower = sum(times["float16"].seconds < roof.fastest(name).seconds for name, times in roof.sites.items())
    if slower:
        words.append(f"{slower} of all sites would be faster in float16, because quantizing their input costs more than it gains")
    return "; ".join(words)


def to_json(roof: Roofline) -> dict[str, Any]:
    """All figures by name."""
    return {
        "expected": True,
        **facts_of(roof),
        "totals": total_rows(roof),
        "outside_ms": 1e3 * roof.outside,
        "as_int8": sorted(roof.as_int8),
        "sites": site_rows(roof),
    }


def show(rooflines: Sequence[Roofline], top: int) -> None:
    """Print facts, totals, and the `top` slowest sites of each."""
    for roof in rooflines:
        console.print_facts(facts_of(roof))
        console.print_table(f"Expected step on {roof.gpu.title}, batch {roof.batch}", total_rows(roof))
        rows = site_rows(roof)
        console.print_table(f"The {min(top, len(rows))} slowest of {len(rows)} sites", rows[:top])


def rooflines_of(path_or_name: str, gpu: str, batches: str, *, fused: bool = False) -> list[Roofline]:
    """Rooflines of a model on a GPU, one for each batch size in `batches`, separated by commas.

    Raises:
        InputError: `batches` contains something else than whole numbers.
        ArtifactError, UnsupportedError: As `layers_of` and `gpu_named`.
    """
    sizes, device = _batches(batches), gpu_named(gpu)
    layers = layers_of(path_or_name)
    return [roofline(layers, device, batch, fused=fused) for batch in sizes]


def _batches(batches: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) for part in batches.split(",")):
        raise InputError(f"--batch {batches}: expected whole numbers from 1 on, separated by commas, for example 1,8.")
    return [int(part) for part in batches.split(",")]


def _quantized(family: Family, work: ModelWork) -> frozenset[str]:
    return frozenset(name for name in work.sites if family.placement(name) == "quantize")


def _sites_only(work: ModelWork, names: Mapping[str, Any]) -> ModelWork:
    return replace(work, sites={name: site for name, site in work.sites.items() if name in names})


def show_step(path_or_name: str, gpu: str, batches: str, branch_rank: int | None = None, *, as_json: bool) -> None:
    """Trace a model and print the expected time of whole steps, every kernel counted.

    Raises:
        InputError: The path is no float model, or `batches` contains something else than whole numbers.
        UnsupportedError: As `gpu_named`.
    """
    device, sizes = gpu_named(gpu), _batches(batches)
    if kind_of(path_or_name) != "model":
        raise InputError(f"--step: {path_or_name} is an {kind_of(path_or_name)} directory; expected a model or an architecture's name.")
    pipeline = pipeline_config_of(path_or_name)
    model = TracedModel.of(pipeline.family_object, pipeline.config)
    branched = None if branch_rank is None else model.with_branches(branch_rank)  # traced once for all batches
    show_steps(pipeline.name, device, {batch: step_rows(model, device, batch, branched) for batch in sizes}, as_json=as_json)


app = run_app.app_with()


@app.command()
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, a published architecture such as sd15, or an artifact.")],
    gpu: Annotated[str, typer.Option(help="GPU: rtx3090, rtx4090, a100 or h200.")] = "rtx3090",
    batch: Annotated[str, typer.Option(help="Samples per call; several numbers with commas.")] = "1,8",
    top: Annotated[int, typer.Option(help="Number of slowest sites to print.")] = 20,
    fused: Annotated[
        bool, typer.Option("--fused", help="Assume that quantization is part of the preceding kernel and takes no time.")
    ] = False,
    step: Annotated[
        bool,
        typer.Option("--step", help="Trace the model, and count every kernel of a whole step: norms, quantizers, attention, the rest."),
    ] = False,
    branch_rank: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_RANK, help="With --step: also with float branches of this rank beside the quantized linear layers."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Print expected times of a model's layers on a GPU. Example: python -m edm_deploy_tools.roofline sd15 --gpu rtx3090 --batch 1,8."""
    if step:
        show_step(model, gpu, batch, branch_rank, as_json=as_json)
        return
    if branch_rank is not None:
        raise InputError("--branch-rank is counted in whole steps. Add --step, or leave it out.")
    rooflines = rooflines_of(model, gpu, batch, fused=fused)
    if as_json:
        console.print_json({"rooflines": [to_json(one) for one in rooflines]})
        return
    show(rooflines, top)


if __name__ == "__main__":
    sys.exit(run_app.run(app, "python -m edm_deploy_tools.roofline"))

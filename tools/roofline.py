"""Expected time of a model's layers on a GPU in float16, INT8 and INT4: what bounds each, where 4 bits pay, and where INT8 is the better choice.

Everything here is expected, from engines/performance/roofline.py; nothing is measured.
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
from edm_deploy.network.family import Family
from edm_deploy.network.layer_costs import ModelWork, SiteWork, model_work
from edm_deploy.runtime.capabilities import code_format as codes_of
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.inspection.describe import kind_of
from edm_deploy_tools.inspection.describe_model import outline_of
from engines.performance.gpus import Gpu, gpu_named
from engines.performance.roofline import MAIN_LOOP, Expected, Matmul, Precision, expected, faster_as_int8

NOTE = (
    "Expected, not measured. Layers and attention's matmuls only: norms, additions and data movement come on top. "
    "Our kernels as good as CUTLASS's; see engines/profiles/measured.toml for the model's errors."
)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What a roofline is drawn of.

    Attributes:
        name: As the user gave it.
        work: Of the model.
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
        gpu, batch: Where, and samples a call.
        fused: Whether quantization is part of the kernel before.
        sites: Expected times by site and precision; INT4 only where the site's codes fit.
        outside: Seconds of attention's own matmuls in float16.
        as_int8: Sites that could run in INT4 but are no slower in INT8.
    """

    layers: Layers
    gpu: Gpu
    batch: int
    fused: bool
    sites: Mapping[str, Mapping[Precision, Expected]]
    outside: float
    as_int8: frozenset[str]

    def chosen(self, site: str, widest: Precision) -> Expected:
        """What a site runs as where nothing narrower than `widest` is allowed."""
        times = self.sites[site]
        return times.get(widest, times["int8"])

    def fastest(self, site: str) -> Expected:
        """INT4 where it is faster, else INT8."""
        return self.chosen(site, "int8" if site in self.as_int8 else "int4")

    def plans(self) -> dict[str, list[Expected]]:
        """The layers' times under each choice of precision."""
        return {
            "float16": [self.chosen(site, "float16") for site in self.sites],
            "INT8": [self.chosen(site, "int8") for site in self.sites],
            "INT4": [self.chosen(site, "int4") for site in self.sites],
            "INT4 where faster": [self.fastest(site) for site in self.sites],
        }


def layers_of(path_or_name: str) -> Layers:
    """A float model, as if quantized to W4A4, or an artifact as it is.

    Raises:
        InputError: Neither.
        ArtifactError, UnsupportedError: Damaged, or of no known family.
    """
    kind = kind_of(path_or_name)
    if kind == "artifact":
        artifact = Artifact.load(Path(path_or_name))
        work = _sites_only(model_work(artifact.family_object, artifact.config, artifact.structure), artifact.sites)
        four = frozenset(name for name, site in artifact.sites.items() if site.activation and codes_of(site) != "s8")
        return Layers(name=path_or_name, work=work, four_bit=four)
    if kind != "model":
        raise InputError(f"{path_or_name} is an {kind} directory; expected a model, an architecture's name or an artifact.")
    outline = outline_of(path_or_name)
    family = outline.family_object
    work = model_work(family, outline.config)
    return Layers(name=outline.name, work=work, four_bit=_quantized(family, work))


def roofline(layers: Layers, gpu: Gpu, batch: int, *, fused: bool = False) -> Roofline:
    """Expected times of every site at one batch size.

    Raises:
        InputError: The batch is smaller than 1.
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
        outside=2 * batch * layers.work.other_macs / (gpu.peak("float16") * MAIN_LOOP),
        as_int8=faster_as_int8(four, gpu, batch, fused_quantize=fused),
    )


def site_rows(found: Roofline) -> list[Row]:
    """A line for each site, the longest first."""
    rows = []
    for name in sorted(found.sites, key=lambda name: -found.fastest(name).seconds):
        times, best = found.sites[name], found.fastest(name)
        row: dict[str, Any] = {"site": name, "bound by": best.bound, "tile": "{}x{}".format(*best.tile), "splits": best.splits}
        for precision in ("float16", "int8", "int4"):
            row[f"{precision} us"] = round(1e6 * times[precision].seconds, 2) if precision in times else None
        rows.append(row | {"best": best.precision, "over float16": round(times["float16"].seconds / best.seconds, 2)})
    return rows


def total_rows(found: Roofline) -> list[Row]:
    """A line for each choice of precision: the layers of one step, and the step with attention's matmuls."""
    rows: list[Row] = []
    for name, times in found.plans().items():
        layers = sum(time.seconds for time in times)
        spent: Counter[str] = Counter()
        for time in times:
            spent.update(time.parts)
        rows.append(
            {
                "precision": name,
                "layers ms": round(1e3 * layers, 3),
                "step ms": round(1e3 * (layers + found.outside), 3),
                "over float16": round(
                    (rows[0]["step ms"] if rows else 1e3 * (layers + found.outside)) / (1e3 * (layers + found.outside)), 2
                ),
                "quantize %": round(100 * sum(time.quantize_seconds for time in times) / layers, 1),
                **{f"{bound} %": round(100 * spent[bound] / layers, 1) for bound in ("tensor cores", "L2", "DRAM", "launch")},
            }
        )
    return rows


def facts_of(found: Roofline) -> dict[str, Any]:
    """What the tables are about, and the answer in a line."""
    return {
        "model": found.layers.name,
        "GPU": f"{found.gpu.title} ({found.gpu.sm})" + ("" if found.gpu.has_int4 else ", without INT4 tensor cores: 4 bits run as INT8"),
        "batch": found.batch,
        "quantization": "in the kernel before" if found.fused else "a kernel of its own",
        "advice": advice(found),
        "note": NOTE,
    }


def advice(found: Roofline) -> str:
    """Where 4 bits pay, in a sentence."""
    four = found.layers.four_bit
    if not four:
        return "no site has 4-bit codes; INT8 throughout"
    if not found.gpu.has_int4:
        return "INT8 throughout; 4 bits save memory only"
    words = [f"4 bits pay at {len(four) - len(found.as_int8)} of the {len(four)} sites that they fit"]
    if found.as_int8:
        words.append(f"INT8 is no slower at the other {len(found.as_int8)}")
    slower = sum(times["float16"].seconds < found.fastest(name).seconds for name, times in found.sites.items())
    if slower:
        words.append(f"{slower} of all would be faster still in float16: quantizing the input costs more than they gain")
    return "; ".join(words)


def to_json(found: Roofline) -> dict[str, Any]:
    """Everything, by name."""
    return {
        "expected": True,
        **facts_of(found),
        "totals": total_rows(found),
        "outside_ms": 1e3 * found.outside,
        "as_int8": sorted(found.as_int8),
        "sites": site_rows(found),
    }


def show(rooflines: Sequence[Roofline], top: int) -> None:
    """Print facts, totals, and the `top` longest sites of each."""
    for found in rooflines:
        console.print_facts(facts_of(found))
        console.print_table(f"Expected step on {found.gpu.title}, batch {found.batch}", total_rows(found))
        rows = site_rows(found)
        console.print_table(f"The {min(top, len(rows))} longest of {len(rows)} sites", rows[:top])


def draw(path_or_name: str, gpu: str, batches: str, *, fused: bool = False) -> list[Roofline]:
    """Rooflines of a model on a GPU, one for each of several batch sizes with commas.

    Raises:
        InputError: `batches` are no whole numbers.
        ArtifactError, UnsupportedError: As `layers_of` and `gpu_named`.
    """
    if not all(part.strip().isdigit() for part in batches.split(",")):
        raise InputError(f"--batch {batches}: expected whole numbers with commas, for example 1,8.")
    device = gpu_named(gpu)
    layers = layers_of(path_or_name)
    return [roofline(layers, device, int(part), fused=fused) for part in batches.split(",")]


def _quantized(family: Family, work: ModelWork) -> frozenset[str]:
    return frozenset(name for name in work.sites if family.placement(name) == "quantize")


def _sites_only(work: ModelWork, names: Mapping[str, Any]) -> ModelWork:
    return replace(work, sites={name: site for name, site in work.sites.items() if name in names})


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, an architecture's name such as sd15, or an artifact.")],
    gpu: Annotated[str, typer.Option(help="rtx3090, rtx4090, a100, h200.")] = "rtx3090",
    batch: Annotated[str, typer.Option(help="Samples a call; several with commas.")] = "1,8",
    top: Annotated[int, typer.Option(help="Sites to show.")] = 20,
    fused: Annotated[bool, typer.Option("--fused", help="Quantization costs nothing: the kernel before writes codes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print json and nothing else on stdout.")] = False,
) -> None:
    """Expected times of a model's layers. Example: python -m edm_deploy_tools.roofline sd15 --gpu rtx3090 --batch 1,8."""
    found = draw(model, gpu, batch, fused=fused)
    if as_json:
        console.print_json({"rooflines": [to_json(one) for one in found]})
        return
    show(found, top)


if __name__ == "__main__":
    sys.exit(run_app.run(app, "python -m edm_deploy_tools.roofline"))

"""A folder for NVIDIA's Polygraphy: our graph, inputs and the reference executor's outputs in its format, and its commands.

Two ONNX directories: `denoiser`, the whole graph, and `sites`, every quantized layer on its own from the reference's input. The second shows which layer is
wrong; through the whole network one rounding tie changes everything that follows.
Source: Polygraphy 0.53, github.com/NVIDIA/TensorRT/tree/main/tools/Polygraphy: `run --load-inputs --load-outputs`, `debug`, `surgeon sanitize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference, SiteRecord
from edm_deploy.artifact.relaxed_timesteps import quantized_graph
from edm_deploy.errors import UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.export.per_site import onnx_cut_at_sites
from edm_deploy.models import family_named
from edm_deploy.network.family import SAMPLE, TIMESTEP, ModelInput
from edm_deploy.network.graph_names import GRAPH_NAME, OUTPUT
from edm_deploy.runtime.manifest import GraphDtype, Manifest
from edm_deploy.storage.directories import write_json
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory

MARKER = "edm-deploy.json"
FOLDER = DirectoryKind("a folder for Polygraphy", MARKER)
DENOISER, SITES, INPUTS, OUTPUTS, README = "denoiser", "sites", "inputs.json", "outputs.json", "README.md"
REFERENCE = "reference"  # the runner's name in Polygraphy's comparison
UNFOLDED = (
    "--no-fold-shapes",
)  # onnx-graphsurgeon 0.6.1 folds Shape without regard to its `start` and `end`, which makes the graph invalid
SAMPLES = 2  # in the saved inputs, at different timesteps
MOST_SITE_BYTES = 1 << 28  # inputs and outputs of all sites together
SITE_TOLERANCE = 1e-5  # of the largest output of a site: float32 sums differ in their order
LEAST_TOLERANCE = 2.0**-10  # of the mean output, where rounding the input changes nothing
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A graph of the folder with saved inputs and expected outputs.

    Attributes:
        name: Of its directory.
        smallest, shapes: Shapes of the inputs at a batch of 1, and those that were saved, by name.
        stat: Statistic of the absolute error that Polygraphy checks, `--check-error-stat`.
        atol: Its largest value.
    """

    name: str
    smallest: Shapes
    shapes: Shapes
    stat: str
    atol: float

    @property
    def compared(self) -> list[str]:
        """Arguments that load the inputs, and the outputs to compare with."""
        loaded = ["--load-inputs", f"{self.name}/{INPUTS}", "--load-outputs", f"{self.name}/{OUTPUTS}"]
        return [*loaded, "--check-error-stat", self.stat, "--atol", f"{self.atol:.3g}"]

    @property
    def profile(self) -> list[str]:
        """Arguments of TensorRT's shape profile."""
        entries = (("--trt-min-shapes", self.smallest), ("--trt-opt-shapes", self.shapes), ("--trt-max-shapes", self.shapes))
        return [word for option, shapes in entries for word in (option, *_words(shapes))]


@dataclass(frozen=True, kw_only=True)
class PolygraphyFolder:
    """What was written.

    Attributes:
        denoiser: The whole graph.
        sites: Every site on its own; None where its inputs and outputs would exceed MOST_SITE_BYTES.
        site_bytes: Size of these.
    """

    denoiser: Case
    sites: Case | None
    site_bytes: int

    @property
    def commands(self) -> dict[str, list[str]]:
        """Polygraphy's commands by what they tell, each a list of words; they run in the folder."""
        whole = self.denoiser
        graph = f"{whole.name}/{GRAPH_NAME}"
        engine = ["polygraphy", "run", "polygraphy_debug.engine", "--trt", *whole.compared]
        subgraph = ["polygraphy", "run", "polygraphy_debug.onnx", "--trt", "--onnxrt", "--strongly-typed"]
        commands = {"Inputs, outputs and layers of the graph": ["polygraphy", "inspect", "model", graph, "--show", "layers"]}
        commands["The graph with one shape, its constants folded"] = [
            *("polygraphy", "surgeon", "sanitize", graph, "-o", "sanitized.onnx", "--fold-constants", *UNFOLDED, "--override-input-shapes"),
            *_words(whole.shapes),
        ]
        for case in filter(None, (self.sites, whole)):
            what = "Every quantized layer on its own" if case is self.sites else "The whole denoiser"
            run = ["polygraphy", "run", f"{case.name}/{GRAPH_NAME}"]
            commands[f"{what}, in ONNX Runtime"] = [*run, "--onnxrt", *case.compared]
            profile = whole.profile if case is whole else ()  # without one, TensorRT builds for the shapes of the saved inputs
            commands[f"{what}, in TensorRT"] = [*run, "--trt", "--strongly-typed", *case.compared, *profile]
        commands["TensorRT 10 with float16 where it is faster"] = [
            *("polygraphy", "run", graph, "--trt", "--int8", "--fp16", *whole.compared, *whole.profile),
        ]
        commands["Layers of that engine that need float32"] = [
            *("polygraphy", "debug", "precision", graph, "--int8", "--fp16", "--precision", "float32", "--mode", "bisect"),
            *(*whole.profile, "--check", *engine),
        ]
        commands["The smallest graph on which TensorRT and ONNX Runtime differ"] = [
            *("polygraphy", "debug", "reduce", "sanitized.onnx", "-o", "reduced.onnx", "--mode", "bisect", "--check", *subgraph),
        ]
        return commands


def write_polygraphy_folder(artifact: Artifact, out: Path, *, dtype: GraphDtype = "fp32") -> PolygraphyFolder:
    """Write the folder, whole or not at all; its graphs are ONNX directories, which `build-engine` takes too.

    Args:
        artifact: A valid artifact; of one with two graphs, the first.
        out: Directory to write.
        dtype: Floating-point type of the graphs.

    Raises:
        UnsupportedError: Polygraphy is not installed.
        ArtifactError: `out` is something else.
    """
    save = _polygraphy()
    check_output(out, kind=FOLDER)
    artifact = quantized_graph(artifact)
    inputs = _inputs(artifact)
    reference = Reference(artifact)
    records = reference.record(inputs)
    site_bytes = sum(4 * (record.x.numel() + record.y.numel()) + record.codes.numel() for record in records.values())
    with new_directory(out, kind=FOLDER) as directory:
        manifest = onnx_from_artifact(artifact, directory / DENOISER, dtype=dtype)
        prediction = reference(inputs)
        save(
            directory / DENOISER,
            {declared.name: _cast(inputs[declared.name], declared, manifest) for declared in manifest.inputs},
            {OUTPUT: prediction},
        )
        denoiser = _case(DENOISER, manifest, stat="mean", atol=_whole_tolerance(reference, inputs, prediction))
        sites = None
        if site_bytes <= MOST_SITE_BYTES:
            cut = onnx_cut_at_sites(artifact, records, directory / SITES, dtype=dtype)
            values = {TIMESTEP.name: inputs[TIMESTEP.name]} | {f"{name}.x": record.x for name, record in records.items()}
            save(directory / SITES, {declared.name: values[declared.name] for declared in cut.inputs}, _site_outputs(records, cut))
            largest = max(float(record.y.abs().max()) for record in records.values())
            sites = _case(SITES, cut, stat="elemwise", atol=SITE_TOLERANCE * largest)
        folder = PolygraphyFolder(denoiser=denoiser, sites=sites, site_bytes=site_bytes)
        (directory / README).write_text(readme(folder, artifact))
        written = [path.name for path in directory.iterdir()]
        write_json(directory / MARKER, {"artifact": artifact.digest, "files": dict.fromkeys(written, "")})
    return folder


def readme(folder: PolygraphyFolder, artifact: Artifact) -> str:
    """The page of the folder: what it holds, and every command."""
    lines = [
        f"# {artifact.family}, {artifact.scheme}, for Polygraphy",
        "",
        f"Artifact {artifact.digest}. `{INPUTS}` and `{OUTPUTS}` are in Polygraphy's format; the outputs are those of edm-deploy's reference executor,",
        f"which sums integers exactly. {SAMPLES} samples of random noise at different timesteps. Run the commands in this folder.",
        "",
        f"`{DENOISER}`: one rounding tie changes all layers after it, so that only the mean error is checked; its bound is what rounding the input to",
        "bfloat16 changes in the reference.",
    ]
    if folder.sites is not None:
        lines += [
            f"`{SITES}`: each quantized layer from the reference's input. Codes are equal; a layer that fails here is computed differently."
        ]
    else:
        lines += [f"No `{SITES}`: inputs and outputs of all quantized layers would take {folder.site_bytes / 1e6:.0f} MB."]
    for title, words in folder.commands.items():
        lines += ["", f"## {title}", "", "```bash", " ".join(words), "```"]
    return "\n".join(lines) + "\n"


def _polygraphy() -> Any:
    """A function that writes inputs and outputs, both by name, into a directory."""
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
    except ImportError as err:
        raise UnsupportedError(
            f'Polygraphy cannot be imported here ({err}). Install it with pip install "edm-deploy[polygraphy]".'
        ) from err

    def save(directory: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        results = RunResults()
        results.add(
            [IterationResult({name: value.numpy() for name, value in outputs.items()}, runner_name=REFERENCE)], runner_name=REFERENCE
        )
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            save_json([{name: value.numpy() for name, value in inputs.items()}], str(directory / INPUTS))
            results.save(str(directory / OUTPUTS))

    return save


def _inputs(artifact: Artifact) -> dict[str, Tensor]:
    """Random inputs; the timesteps are in the middle of equal parts of the noise schedule."""
    family, generator = artifact.family_object, torch.Generator().manual_seed(0)
    sample = torch.randn(SAMPLES, *family.sample_shape(artifact.config), generator=generator)
    timesteps = ((torch.arange(SAMPLES) + 0.5) / SAMPLES * artifact.num_train_timesteps).floor()
    return {SAMPLE: sample, TIMESTEP.name: timesteps} | family.random_conditioning(artifact.config, SAMPLES, generator)


def _cast(value: Tensor, declared: ModelInput, manifest: Manifest) -> Tensor:
    return value.to(declared.dtype(manifest.torch_dtype))


def _site_outputs(records: Mapping[str, SiteRecord], cut: Manifest) -> dict[str, Tensor]:
    values = {f"{name}.y": record.y for name, record in records.items()}
    values |= {f"{name}.codes": record.codes.to(torch.int8) for name, record in records.items()}
    return {name: values[name] for name in cut.outputs}


def _whole_tolerance(reference: Reference, inputs: Mapping[str, Tensor], prediction: Tensor) -> float:
    """Mean change of the reference's prediction when its input is rounded to bfloat16."""
    rounded = reference({**inputs, SAMPLE: inputs[SAMPLE].bfloat16().float()})
    return max(float((rounded - prediction).abs().mean()), LEAST_TOLERANCE * float(prediction.abs().mean()))


def _case(name: str, manifest: Manifest, *, stat: str, atol: float) -> Case:
    known = family_named(manifest.family).sizes(manifest.config)

    def shapes(batch: int) -> dict[str, list[int]]:
        of = {**known, "batch": batch}
        return {declared.name: [of[dim] if isinstance(dim, str) else dim for dim in declared.dims] for declared in manifest.inputs}

    return Case(name=name, smallest=shapes(1), shapes=shapes(SAMPLES), stat=stat, atol=atol)


def _words(shapes: Shapes) -> list[str]:
    return [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]

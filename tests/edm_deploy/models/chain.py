"""A tiny latent model's whole way: its diffusers pipeline in a directory, calibrated on prompts, exported, built, and a pipeline again.

The file of each family calls the checks that hold for it, under the same names.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from diffusers import DiffusionPipeline

import calibration
from calibration.recipes.mse import Mse
from calibration.run.options import RunOptions
from edm_deploy import load_pipeline
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.pipelines.prompt_encoding import encode, takes_prompts
from edm_deploy.pipelines.rebuild import without_loading_messages
from edm_deploy.pipelines.schedulers import scheduler_named
from edm_deploy.pipelines.source import Source, float_artifact, load_source
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy.storage.directories import INDEX_FILE
from engines import build_engine
from tests import tiny_transformers, tiny_unets
from tests.conftest import tiny_inputs
from tests.tiny_transformers import LABELS

# float32 sums in another order, 1e-6 a step; a wrong layer would be off by its whole output.
FLOAT_TOLERANCE = 1e-4
PROMPTS = ("a cat", "two dogs in the snow")


@dataclass(frozen=True)
class Chain:
    """A diffusers pipeline, and what became of it.

    Attributes:
        original: As it was saved.
        source: As `load_source` reads it from its directory.
        artifact: W4A8, calibrated on PROMPTS where it takes any.
        exact: `load_pipeline` of an engine of the float model.
        quantized: The drop-in of an engine of the artifact.
    """

    original: DiffusionPipeline
    source: Source
    artifact: Artifact
    exact: DiffusionPipeline
    quantized: EngineDenoiser

    @property
    def denoiser(self) -> EngineDenoiser:
        """The drop-in of the float model."""
        return getattr(self.exact, self.component)

    @property
    def component(self) -> str:
        """The denoiser's name in the pipeline."""
        return self.source.family_object.component


def tiny_pipeline(kind: str) -> DiffusionPipeline:
    """The diffusers pipeline of a kind, as it was before it was saved."""
    return (tiny_unets if kind in tiny_unets.MAKERS else tiny_transformers).tiny_pipeline(kind)


@cache
def home(kind: str) -> Path:
    """The pipeline's directory."""
    directory = Path(mkdtemp(prefix="edm-chain-")) / kind
    with without_loading_messages():
        tiny_pipeline(kind).save_pretrained(directory)
    if kind == "dit":  # as published: diffusers reads the labels from there, and does not save them
        index = json.loads((directory / INDEX_FILE).read_text())
        (directory / INDEX_FILE).write_text(json.dumps(index | {"id2label": LABELS}))
    return directory


@cache
def chain(kind: str) -> Chain:
    """Both engines, for batches of 1 to 4, sizes of 8 to 16 latents and any text."""
    source = load_source(home(kind))
    prompts = home(kind) / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    recipe = Mse(weight_bits=4, act_bits=8, rows=3, calibration_samples=2)
    artifact = calibration.fit(source, recipe, RunOptions(prompts=prompts if takes_prompts(source) else None))
    dims = {declared for inputs in source.family_object.inputs(source.config) for declared in inputs.dims}
    sizes = {"batch": ShapeRange(1, 2, 4), "tokens": ShapeRange(1, 8, 512), "image_tokens": ShapeRange(16, 16, 64)}
    sizes |= {"height": ShapeRange(8, 8, 16), "width": ShapeRange(8, 8, 16)}
    options = BuildOptions(profile={dim: size for dim, size in sizes.items() if dim in dims})
    engines = []
    for name, made in (("float", float_artifact(source)), ("w4a8", artifact)):
        place = home(kind).parent / name
        onnx_from_artifact(made, place / "onnx")
        build_engine(place / "onnx", place / "engine", backend="ort", options=options)
        engines.append(load_pipeline(place / "engine"))
        engines[-1].set_progress_bar_config(disable=True)
    return Chain(tiny_pipeline(kind), source, artifact, engines[0], getattr(engines[1], source.family_object.component))


def check_float_engine(kind: str) -> None:
    """At two resolutions from one engine, each sample at another timestep."""
    made = chain(kind)
    for size in (8, 16):
        inputs = tiny_inputs(kind, size=size)
        expected = made.source.family_object.forward(made.source.model, inputs)
        torch.testing.assert_close(made.denoiser.run(inputs), expected, rtol=0, atol=FLOAT_TOLERANCE)


def check_quantized_engine(kind: str) -> None:
    """No further from the reference than the reference is from the float model: a tie of rounding cascades."""
    made = chain(kind)
    inputs = tiny_inputs(kind)
    exact, expected = made.source.family_object.forward(made.source.model, inputs), Reference(made.artifact)(inputs)
    found = made.quantized.run(inputs)
    assert (expected - exact).norm() > 0
    assert (found - expected).norm() <= (expected - exact).norm()


def check_pipeline(kind: str, scheduler: str | None = None, settings: dict | None = None, **arguments) -> None:
    """The pipeline that comes back gives what the original gives, within 1e-4, by the scheduler that it is shipped with or by another one."""
    made = chain(kind)
    results = []
    for pipeline in (made.original, made.exact):
        own = pipeline.scheduler
        if scheduler:
            pipeline.scheduler = scheduler_named(scheduler, dict(own.config) | (settings or {}))
        torch.manual_seed(0)  # some pipelines hand their generator to no scheduler
        try:
            result = pipeline(**arguments, num_inference_steps=3, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        finally:
            pipeline.scheduler = own
        results.append(torch.as_tensor(result))
    # In units of the sample's own size, which is 1 where a model is trained; an untrained one, guided, walks a diffusion to some hundreds.
    size = float(results[0].square().mean().sqrt())
    assert size > 0
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=FLOAT_TOLERANCE * max(1.0, size))


def check_components(kind: str) -> None:
    """The pipeline is of the class that went in; its other components hold the very same weights, the denoiser is the engine."""
    made = chain(kind)
    assert type(made.exact) is type(made.original)
    assert isinstance(made.denoiser, EngineDenoiser)
    assert set(made.exact.components) == set(made.original.components)
    for name, part in made.original.components.items():
        back = made.exact.components[name]
        if name == made.component:
            continue
        assert type(back) is type(part), name
        if isinstance(part, torch.nn.Module):
            state = back.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items()), name
        elif name.startswith("tokenizer") and part is not None:
            assert back(PROMPTS[1]).input_ids == part(PROMPTS[1]).input_ids
    back, own = (dict(pipeline.scheduler.config) for pipeline in (made.exact, made.original))
    assert {key: value for key, value in back.items() if not key.startswith("_")} == {
        key: value for key, value in own.items() if not key.startswith("_")
    }


def check_prompts(kind: str, expected: tuple, without: tuple) -> None:
    """Prompts become what the pipeline's own `encode_prompt` makes of them, and the calibration was told so.

    Args:
        kind: Of the pipeline.
        expected: Of the family's `text_inputs`, in order, as its `encode_prompt` gives them for PROMPTS.
        without: For no prompt; empty where the model is not guided by leaving the prompt away.
    """
    made = chain(kind)
    family = made.source.family_object
    given, none = encode(home(kind), family, made.source.config, PROMPTS)
    assert list(given) == list(family.text_inputs)
    for name, value in zip(family.text_inputs, expected, strict=True):
        torch.testing.assert_close(given[name], value.float())
    assert list(none) == (list(family.text_inputs) if without else [])
    for name, value in zip(none, without, strict=True):
        torch.testing.assert_close(none[name], value[:1].float())
    assert made.artifact.provenance["conditioning"].startswith("2 prompts")
    assert made.artifact.provenance["guidance"] == family.guidance(made.source.config).scale

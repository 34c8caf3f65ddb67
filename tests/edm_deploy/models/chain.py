"""A tiny transformer's whole way: float and W4A4 engine beside the float model and the reference, in the family's own pipeline."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from diffusers import AutoencoderKL

from edm_deploy.denoiser import EngineDenoiser, load_denoiser
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.manifest import Range
from edm_deploy.pipelines import Source, float_artifact, scheduler_named
from edm_deploy.reference import Reference
from edm_deploy.session import BuildOptions
from engines import build_engine
from tests.conftest import FLOW_SCHEDULER, PIPELINE, SCHEDULER, TINY, artifact_by_hand, tiny_inputs, tiny_model

FLOAT_TOLERANCE = 1e-4  # float32 sums in another order; a wrong layer would be off by its whole output


@dataclass(frozen=True)
class Chain:
    """A diffusers model, and the drop-ins for it."""

    model: torch.nn.Module
    exact: EngineDenoiser
    quantized: EngineDenoiser


@cache
def chain(kind: str) -> Chain:
    """Both engines, for batches of 1 to 4 and sizes of 8 to 16 latents; the model is diffusers' own, as users have it."""
    family, config, model = tiny_model(kind)
    own = family.model_class.from_config(config).eval().requires_grad_(False)
    own.load_state_dict(model.state_dict())
    scheduler = scheduler_named("flow-euler", FLOW_SCHEDULER) if family.flow else scheduler_named("ddim", SCHEDULER)
    source = Source(name=kind, family=TINY[kind][0], config=config, model=model, scheduler=scheduler, pipeline=PIPELINE)
    home = Path(mkdtemp(prefix="edm-chain-"))
    profile = {"batch": Range(1, 2, 4), "tokens": Range(1, 8, 512)}
    profile |= {"image_tokens": Range(16, 16, 64)} if kind.startswith("flux") else {dim: Range(8, 8, 16) for dim in ("height", "width")}
    if kind == "dit":
        del profile["tokens"]
    engines = []
    for name, artifact in (("float", float_artifact(source)), ("w4a4", artifact_by_hand(kind))):
        onnx_from_artifact(artifact, home / f"{name}-onnx")
        build_engine(home / f"{name}-onnx", home / name, backend="ort", options=BuildOptions(profile=profile))
        engines.append(load_denoiser(home / name))
    return Chain(own, *engines)


def check_float_engine(kind: str) -> None:
    """At two resolutions from one engine, each sample at another timestep."""
    family, _, model = tiny_model(kind)
    for size in (8, 16):
        inputs = tiny_inputs(kind, size=size)
        torch.testing.assert_close(chain(kind).exact.run(inputs), family.forward(model, inputs), rtol=0, atol=FLOAT_TOLERANCE)


def check_quantized_engine(kind: str) -> None:
    """No further from the reference than the reference is from the float model: a tie of rounding cascades."""
    family, _, model = tiny_model(kind)
    inputs = tiny_inputs(kind)
    exact, expected = family.forward(model, inputs), Reference(artifact_by_hand(kind))(inputs)
    found = chain(kind).quantized.run(inputs)
    assert (expected - exact).norm() > 0
    assert (found - expected).norm() <= (expected - exact).norm()


def check_pipeline(pipeline, kind: str, **arguments) -> None:
    """The pipeline gives the same with the float engine in the model's place."""
    pipeline.set_progress_bar_config(disable=True)
    results = []
    for transformer in (chain(kind).model, chain(kind).exact):
        pipeline.transformer = transformer
        torch.manual_seed(0)  # some pipelines hand their generator to no scheduler
        result = pipeline(**arguments, num_inference_steps=3, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        results.append(torch.as_tensor(result))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=FLOAT_TOLERANCE * float(results[0].abs().max().clamp(min=1)))


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """Halves the size three times."""
    torch.manual_seed(0)
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=64,
        shift_factor=0.0,
    ).eval()

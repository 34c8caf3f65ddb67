"""Small models and hand-made artifacts that every folder's tests share."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.models import family_named
from edm_deploy.network.family import Family
from edm_deploy.numerics.activation_table import ActivationTable, nearest_rows
from edm_deploy.numerics.codes import quantize_weight, symmetric_bounds, weight_bounds

# What is computed once on a machine is not taken from, nor left in, the cache of the user who runs the tests. Read when huggingface_hub is imported.
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="edm-deploy-cache-")
atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # a worker for each core (`make test`); threads of one would take turns with those of the other


def pytest_collection_finish() -> None:
    """Leave what is imported by now, a million objects of torch and diffusers, out of every later pass of the garbage collector."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


TINY_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
TINY_CLASS_UNET = TINY_UNET | {"num_class_embeds": 5}
TINY_CONDITION_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
TINY_SDXL = TINY_CONDITION_UNET | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
TINY_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
TINY_PIXART = TINY_DIT | {"cross_attention_dim": 16, "caption_channels": 12}
TINY_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 12,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}
TINY_FLUX = {
    "sample_size": 8,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
TINY = {
    "unet2d": ("unet2d", TINY_UNET),
    "unet2d-classes": ("unet2d", TINY_CLASS_UNET),
    "unet2d-condition": ("unet2d-condition", TINY_CONDITION_UNET),
    "sdxl": ("unet2d-condition", TINY_SDXL),
    "dit": ("dit-transformer-2d", TINY_DIT),
    "pixart": ("pixart-transformer-2d", TINY_PIXART),
    "pixart-1024": (
        "pixart-transformer-2d",
        TINY_PIXART | {"num_layers": 1, "num_attention_heads": 3, "cross_attention_dim": 24, "use_additional_conditions": True},
    ),
    "sd3": ("sd3-transformer-2d", TINY_SD3),
    "flux": ("flux-transformer-2d", TINY_FLUX),
    "flux-schnell": ("flux-transformer-2d", TINY_FLUX | {"guidance_embeds": False}),
}
# Not met by the contracts, which take one config for each kind of graph: what is particular to these is tested with their family.
VARIANTS = {
    "sd2": ("unet2d-condition", TINY_CONDITION_UNET | {"use_linear_projection": True, "attention_head_dim": [1, 2]}),
    "inpainting": ("unet2d-condition", TINY_CONDITION_UNET | {"in_channels": 9}),
    "skip": ("unet2d", TINY_UNET | {"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2}),
    "ldm": ("unet2d-condition", TINY_CONDITION_UNET | {"in_channels": 3, "out_channels": 3}),
}
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
PIPELINE = {
    "model_index.json": {"_class_name": "DDIMPipeline", "scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]},
    "scheduler/scheduler_config.json": SCHEDULER,
}


def tiny_model(kind: str) -> tuple[Family, dict, torch.nn.Module]:
    """Family, full config and seeded random float model of one of TINY or VARIANTS."""
    name, config = (TINY | VARIANTS)[kind]
    family = family_named(name)
    torch.manual_seed(0)
    model = family.build(config).eval().requires_grad_(False)
    full = json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
    return family, full, model


def tiny_inputs(kind: str, batch: int = 3, size: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Graph inputs for a tiny model, each sample at another timestep."""
    family, config, _ = tiny_model(kind)
    config = config | {"sample_size": size}
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, *family.sample_shape(config), generator=generator)
    timestep = torch.linspace(0, 999, batch).round()
    return {"sample": sample, "timestep": timestep} | family.random_conditioning(config, batch, generator)


def artifact_by_hand(kind: str = "unet2d", weight_bits: int = 4, act_bits: int = 4, rows: int = 5) -> Artifact:
    """An artifact without calibration: largest values of one forward pass, tables that differ by row in scale and bounds."""
    family, config, model = tiny_model(kind)
    largest: dict[str, float] = {}
    layers = family.sites(model)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: largest.__setitem__(name, float(args[0].abs().max())))
        for name, layer in layers.items()
    ]
    family.forward(model, tiny_inputs(kind))
    for hook in hooks:
        hook.remove()
    sites = {}
    for name, layer in layers.items():
        bits, activation_bits = (8, 8) if family.placement(name) == "w8a8" else (weight_bits, act_bits)
        weight = layer.weight.detach()
        scale = weight.flatten(1).abs().amax(1).clamp(min=1e-6) / weight_bounds(bits)[1]
        sites[name] = QuantizedLayer(
            op="conv2d" if weight.ndim == 4 else "linear",
            codes=quantize_weight(weight, scale, bits),
            weight_scale=scale,
            weight_bits=bits,
            activation=table_by_hand(activation_bits, largest[name], rows) if activation_bits < 16 else None,
        )
    timesteps = torch.arange(0, 1000, 1000 // rows, dtype=torch.int32)[:rows]
    return Artifact(
        family=(TINY | VARIANTS)[kind][0],
        config=config,
        timesteps=timesteps,
        row_of_timestep=nearest_rows(timesteps, 1000),
        sites=sites,
        params={key: value.clone() for key, value in model.state_dict().items() if key.removesuffix(".weight") not in sites},
        provenance={"recipe": "by hand"},
        pipeline=PIPELINE,
    )


def check_no_further(found: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> None:
    """Each sample of a whole low-bit network is no further from the reference than the reference is from the float model.

    Nothing tighter holds on every CPU: float32 sums in another order move a value across a rounding tie, and one flipped code changes what all later layers
    see. That an executor computes the reference's integers is compared exactly, site by site, from the reference's own inputs.
    """
    distances, allowed = ((one - other).float().flatten(1).norm(dim=1) for one, other in ((found, expected), (expected, exact)))
    assert bool((allowed > 0).all())
    assert bool((distances <= allowed).all()), f"{distances.tolist()}, allowed {allowed.tolist()}"


def table_by_hand(bits: int, largest: float, rows: int) -> ActivationTable:
    """Scales that grow by 5 % a row; below 8 bit an asymmetric range, one code wider below zero at every second row."""
    if bits == 8:
        qmin, qmax = torch.full((rows,), -128), torch.full((rows,), 127)
    else:
        below = symmetric_bounds(bits)[1] // 2 + torch.arange(rows) % 2
        qmin, qmax = -below, 2**bits - 1 - below
    scale = largest / symmetric_bounds(bits)[1] * (1 + 0.05 * torch.arange(rows))
    return ActivationTable(bits=bits, scale=scale.float(), qmin=qmin.to(torch.int8), qmax=qmax.to(torch.int8))


@pytest.fixture(scope="session", autouse=True)
def _one_trace_each() -> Iterator[None]:
    """A float graph is traced once for each model, float type and state of the sources: tracing takes most of an export's time."""
    from tests.shared_traces import share_traces

    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        yield


@pytest.fixture(autouse=True)
def _sigint() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in every test, also where the suite was started with SIGINT ignored (`nohup`, a background job)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """A SIGINT that a worker's test raises and nobody catches fails that test; by itself it would end the worker and all of its tests."""
    try:
        return (yield)
    except KeyboardInterrupt:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        pytest.fail("KeyboardInterrupt: the test raised SIGINT, and nothing under test caught it")


@pytest.fixture(scope="session")
def artifact_w4a4() -> Artifact:
    return artifact_by_hand()


@pytest.fixture(scope="session")
def artifact_w8a8() -> Artifact:
    return artifact_by_hand(weight_bits=8, act_bits=8)


@pytest.fixture(scope="session")
def onnx_w4a4(artifact_w4a4: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edm_deploy.export.onnx import onnx_from_artifact

    path = tmp_path_factory.mktemp("onnx") / "w4a4"
    onnx_from_artifact(artifact_w4a4, path)
    return path


@pytest.fixture
def save_tiny_pipeline() -> Callable[[Path], Path]:
    """Writes a tiny diffusers pipeline, float model and scheduler, into a directory."""

    def save(path: Path, kind: str = "unet2d") -> Path:
        from diffusers import DDIMPipeline, DDIMScheduler

        _, _, model = tiny_model(kind)
        DDIMPipeline(model, DDIMScheduler(num_train_timesteps=1000)).save_pretrained(path)
        return path

    return save

"""Train a small pixel-space diffusion model on images, on a CPU or a GPU, and write it as a diffusers pipeline.

Run it with `python -m edm_deploy_tools.train_reference DATA --out DIR`. The model in assets/ was trained with the default settings (see its README).
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration.run.options import Interrupted
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.numerics.seeds import check_seed, derived_seed
from edm_deploy.storage.directories import INDEX_FILE, PIPELINE_NAMES, read_json, write_json
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common import options as opt
from edm_deploy_tools.images.dataset import load_images
from edm_deploy_tools.images.sample import grid_of

STATE_JSON = "training.json"
STATE_TENSORS = "training.safetensors"
PIPELINE = DirectoryKind("a pipeline", INDEX_FILE, (*PIPELINE_NAMES, "unet"))
STATE = DirectoryKind("a training state", STATE_JSON, (STATE_TENSORS,))
SAVE_EVERY_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a training run; the defaults are those of the shipped model, whose README states the training time.

    Attributes:
        size: Height and width in pixels.
        channels: Channels of each level; height and width are halved between levels.
        steps: Optimizer steps.
        batch: Images per step.
        rate: Peak learning rate of AdamW; linear warm-up over 2 % of the steps, then cosine decay.
        ema: Decay of the moving average of the weights, which is saved.
        snr_gamma: Clamp of the loss weight min(SNR, gamma) / SNR. Source: min-SNR, arXiv 2303.09556.
        seed: Random seed.
    """

    size: int = 32
    channels: tuple[int, ...] = (64, 128, 128)
    steps: int = 10_900
    batch: int = 32
    rate: float = 4e-4
    ema: float = 0.999
    snr_gamma: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        check_seed(self.seed)
        multiple = 2 ** (len(self.channels) - 1)
        if self.size % multiple:
            raise InputError(f"size {self.size} is not a multiple of {multiple}, which {len(self.channels)} levels need.")


def train(images: Tensor, settings: Settings, out: Path, *, device: torch.device, resume: bool = False) -> Path:
    """Train, and write a DDIMPipeline with the moving average of the weights in float16 into `out`.

    Args:
        images: uint8 [N, 3, size, size].
        settings: Settings of the run.
        out: Output directory; the training state is in `<out>.training`.
        device: Device of the training.
        resume: Whether to continue from that state.

    Raises:
        ArtifactError: `out` holds other files, or there is no state to resume.
        Interrupted: Ctrl-C; the state is saved.
    """
    check_output(out, kind=PIPELINE, overwrite=False)
    state_path = out.with_name(out.name + ".training")
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    run = Training(settings, scheduler, device)
    first = run.load(state_path) if resume else 0
    saved = time.monotonic()
    step_done = console.training_progress(settings.steps, first=first, device=device)
    try:
        for step in range(first, settings.steps):
            step_done(step + 1, run.step(step, images))
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                run.save(state_path, step + 1)
                saved = time.monotonic()
    except KeyboardInterrupt:
        run.save(state_path, step)
        raise Interrupted(f"Interrupted before step {step + 1}; the state is in {state_path}. Run it again with --resume.") from None
    with new_directory(out, kind=PIPELINE, overwrite=False) as directory:
        save_pipeline(run.average, scheduler, directory)
    return out


class Training:
    """Model, moving average and optimizer. Each step has its own random generator, so that a resumed run is identical to an uninterrupted one."""

    def __init__(self, settings: Settings, scheduler: Any, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.alphas = scheduler.alphas_cumprod.to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = make_model(settings).to(device)
        self.average = make_model(settings).to(device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.rate, weight_decay=1e-2)

    def step(self, number: int, images: Tensor) -> float:
        """Run one optimizer step; returns the weighted loss."""
        settings = self.settings
        generator = torch.Generator().manual_seed(derived_seed(settings.seed, number))
        chosen = torch.randint(len(images), (settings.batch,), generator=generator)
        flipped = torch.rand(settings.batch, 1, 1, 1, generator=generator) < 0.5
        clean = images[chosen].float() / 127.5 - 1
        clean = torch.where(flipped, clean.flip(-1), clean).to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        timesteps = torch.randint(len(self.alphas), (settings.batch,), generator=generator).to(self.device)
        alpha = self.alphas[timesteps].reshape(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16):
            predicted = self.model(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps).sample
        snr = (alpha / (1 - alpha)).flatten()
        weight = snr.clamp(max=settings.snr_gamma) / snr
        loss = ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weight).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * rate_factor(number, settings.steps)
        self.optimizer.step()
        decay = min(settings.ema, (1 + number) / (10 + number))  # a short average at first, to forget the random initialization
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        return float(loss.detach())

    def save(self, path: Path, step: int) -> None:
        """Write the state, completely or not at all."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        with new_directory(path, kind=STATE) as directory:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, directory / STATE_TENSORS)
            write_json(directory / STATE_JSON, {"step": step, "settings": repr(self.settings)})

    def load(self, path: Path) -> int:
        """Restore a state that `save` wrote; returns the number of steps done."""
        description = read_json(path / STATE_JSON, what="training state")
        if description.get("settings") != repr(self.settings):
            raise ArtifactError(
                f"{path} is the state of another run ({description.get('settings')}). Use its settings, or start without --resume."
            )
        tensors = load_file(path / STATE_TENSORS, device=str(self.device))
        self.model.load_state_dict(_below("model.", tensors))
        self.average.load_state_dict(_below("average.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        return int(description["step"])


def make_model(settings: Settings) -> nn.Module:
    """A UNet2DModel with attention at all levels except the first and the last."""
    levels = len(settings.channels)
    attention = [0 < level < levels - 1 for level in range(levels)]
    model: nn.Module = UNet2DModel(
        sample_size=settings.size,
        block_out_channels=settings.channels,
        layers_per_block=1,
        norm_num_groups=math.gcd(32, *settings.channels),
        attention_head_dim=min(64, settings.channels[-1]),
        down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
    )
    return model


def rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over the first 2 % of the steps, then cosine decay to 0."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def save_pipeline(model: nn.Module, scheduler: Any, directory: Path) -> None:
    """Write a DDIMPipeline in float16 with safetensors weights, and samples.png."""
    pipeline = DDIMPipeline(unet=model.cpu().eval(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=16, num_inference_steps=50, generator=torch.Generator().manual_seed(0)).images
    pipeline.to(torch.float16).save_pretrained(directory, safe_serialization=True)
    grid_of(images).save(directory / "samples.png")


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


app = run_app.app_with()


@app.command()
def command(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of images, or parquet file with columns img and label.")],
    out: opt.Out,
    label: Annotated[int | None, typer.Option(help="Class to load from a parquet file; 1 is automobile in CIFAR-10. Default: all.")] = None,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 32,
    channels: Annotated[str, typer.Option(help="Channels of each level, separated by commas.")] = "64,128,128",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 10_900,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 32,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Random seed, 0 to 2^32 - 1.")] = 0,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
) -> None:
    """Train a small diffusion model. Example: python -m edm_deploy_tools.train_reference cifar10/train.parquet --label 1 --out cars."""
    if not all(part.strip().isdigit() for part in channels.split(",")):
        raise InputError(f"--channels {channels}: expected whole numbers separated by commas, for example 64,128,128.")
    settings = Settings(size=size, channels=tuple(int(part) for part in channels.split(",")), steps=steps, batch=batch, seed=seed)
    images = load_images(data, size=size, label=label)
    sys.stderr.write(f"{len(images)} images\n")
    console.wrote(train(images, settings, out, device=torch.device(device), resume=resume), "diffusers pipeline, float16")


if __name__ == "__main__":
    sys.exit(run_app.run(app, "python -m edm_deploy_tools.train_reference"))

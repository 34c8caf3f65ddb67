"""Quantize a random transformer whose activations have outliers in few channels, as those of trained transformers do, and measure the error.

    python -m edm_deploy_tools.bench_outliers --seeds 0 1 2 --recipe mse --set rotate=all

The model is DiT-XL/2 (arXiv 2212.09748) at its own width, with two blocks. Without `--set`, the recipe is measured as published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import calibration
from calibration.run.options import RunOptions
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.models import family_named
from edm_deploy.pipelines.guidance import Conditioner
from edm_deploy.pipelines.sampling import trajectory
from edm_deploy.pipelines.schedulers import scheduler_named
from edm_deploy.pipelines.source import Source
from edm_deploy_tools.common.recipe_settings import recipe_with
from edm_deploy_tools.evaluation.denoisers import denoise_of_artifact, denoise_of_source
from edm_deploy_tools.evaluation.trajectory_error import relative_error

FAMILY = "dit-transformer-2d"
DIT_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2}
DIT_XL |= {"num_embeds_ada_norm": 1000, "num_layers": 2, "sample_size": 32}
SHARE = 1 / 128  # of the channels are outliers: 9 of 1152
FACTORS = (10.0, 50.0)  # by which their values are larger


@dataclass(frozen=True)
class Outliers:
    """How outliers are made.

    Attributes:
        factors: Lowest and highest factor, drawn log-uniformly for each outlier.
        compensation: Power of the factor by which the reading layer's weight is divided: 0 leaves it, 1 preserves the model's function.
    """

    factors: tuple[float, float] = FACTORS
    compensation: float = 0.5


def outlier_source(seed: int, outliers: Outliers | None, **config: int) -> Source:
    """A DiT with random weights, and outliers in the input of every linear layer of its blocks.

    In each block SHARE of the channels of four activations are multiplied by a factor: those of both adaptive norms, of the values of attention and of
    the feed-forward network's hidden layer, by way of the rows of the layers that compute them. The gates' bias is 1, so that every block takes
    part in the prediction as in a trained model.

    Args:
        seed: Of weights and outliers.
        outliers: None makes none.
        config: Keys of the config other than those of DiT-XL/2 with two blocks.
    """
    family = family_named(FAMILY)
    torch.manual_seed(seed)
    full = family.full_config(DIT_XL | config)
    model = family.build(full).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    blocks: Any = model.transformer_blocks
    for block in blocks:
        for norm_index, readers in ((1, ("to_q", "to_k", "to_v")), (4, ("net.0.proj",))):
            linear = block.norm1.linear  # its rows are shift, scale and gate of either half
            weight, bias = linear.weight.view(6, -1, linear.in_features), linear.bias.view(6, -1)
            bias[norm_index + 1] += 1
            if outliers is not None:
                channels, factors = _draw(bias.shape[1], outliers, generator)
                bias[norm_index - 1, channels] *= factors
                bias[norm_index, channels] = factors * (1 + bias[norm_index, channels]) - 1  # the norm's output is multiplied by 1 + scale
                weight[norm_index - 1 : norm_index + 1, channels] *= factors[:, None]
                parts = block.attn1 if norm_index == 1 else block.ff
                _divide([parts.get_submodule(name) for name in readers], channels, factors, outliers)
        if outliers is not None:
            for writer, reader in ((block.attn1.to_v, block.attn1.to_out[0]), (block.ff.net[0].proj, block.ff.net[2])):
                channels, factors = _draw(writer.out_features, outliers, generator)
                writer.weight[channels] *= factors[:, None]
                writer.bias[channels] *= factors
                _divide([reader], channels, factors, outliers)
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    return Source(name=f"outliers-{seed}", family=FAMILY, config=full, model=model, scheduler=scheduler, pipeline={})


def _draw(channels: int, outliers: Outliers, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the outliers among a number of channels, and their factors."""
    chosen = torch.randperm(channels, generator=generator)[: max(1, round(channels * SHARE))]
    low, high = torch.tensor(outliers.factors).log()
    return chosen, (low + (high - low) * torch.rand(len(chosen), generator=generator)).exp()


def _divide(readers: Sequence[nn.Module], channels: Tensor, factors: Tensor, outliers: Outliers) -> None:
    for reader in readers:
        weight: Any = reader.weight
        weight[:, channels] /= factors**outliers.compensation


@torch.no_grad()
def noise_error(source: Source, artifact: Artifact, *, samples: int, steps: int) -> float:
    """||e_q - e_f||^2 / ||e_f||^2 of an artifact in the reference executor, the mean over the steps of the float model's DDIM trajectories without guidance."""
    generator = torch.Generator().manual_seed(123)
    conditioner = Conditioner(source.family_object, source.config, scale=1.0)
    noise = torch.randn(samples, *source.family_object.latent_shape(source.config), generator=generator)
    conditioning = conditioner.of(conditioner.draw(samples, generator))
    scheduler = scheduler_named("ddim", source.scheduler.config)
    quantized = denoise_of_artifact(artifact, conditioning)
    return fmean(
        relative_error(quantized(step.sample, torch.full((samples,), step.timestep)), step.prediction)
        for step in trajectory(denoise_of_source(source, conditioning), scheduler, noise, steps=steps)
    )


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the model's weights and outliers")
    parser.add_argument("--recipe", default="mse", help="as `edm-deploy finetune --recipe` takes it")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--config", dest="config", action="append", default=[], help="KEY=VALUE of the model, a whole number")
    parser.add_argument("--compensation", type=float, default=Outliers.compensation, help="0: readers' weights stay, 1: the function does")
    parser.add_argument("--plain", action="store_true", help="no outliers")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parsed = parser.parse_args(arguments)
    flags = {"weight_bits": 4, "act_bits": 4, "rows": 10, "calibration_samples": 4, "guidance": 1.0}
    outliers = None if parsed.plain else Outliers(compensation=parsed.compensation)
    config = {key: int(value) for key, _, value in (text.partition("=") for text in parsed.config)}
    for seed in parsed.seeds:
        recipe = recipe_with(parsed.recipe, flags=flags, overrides=parsed.overrides)
        source = outlier_source(seed, outliers, **config)
        artifact = calibration.fit(source, recipe, RunOptions())
        found = noise_error(source, artifact, samples=parsed.samples, steps=parsed.steps)
        sys.stdout.write(f"seed {seed}: noise error {found:.4f}; {artifact.structure.summary()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(sys.argv[1:])

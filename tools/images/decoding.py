"""What people see of a finished sample: its pixels, what the pipeline's VAE makes of its latents, or the latents themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from edm_deploy.errors import ArtifactError, first_line
from edm_deploy.network.family import Config, Family
from edm_deploy.pipelines.model_index import INDEX
from edm_deploy.pipelines.source import Source

Kind = Literal["pixels", "decoded", "latents"]
VAE = "vae"
PIXEL_CHANNELS = (1, 3)
SMALLEST_MSE = 1e-12  # relative to a peak of 2: keeps the PSNR of identical images finite, 126 dB


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Makes images of finished samples.

    Attributes:
        kind: What the images are: `pixels` of a model of pixels, latents `decoded` by the VAE, or `latents` where there is no VAE.
        family: Of the model.
        config: Likewise.
        vae: diffusers' VAE in float32, for `decoded`.
    """

    kind: Kind
    family: Family
    config: Config
    vae: Any = None  # diffusers ships no types

    @property
    def words(self) -> str:
        """What is compared, as a phrase."""
        return {
            "pixels": "the samples, clamped to [-1, 1]",
            "decoded": "the images that the pipeline's VAE decodes, clamped to [-1, 1]",
            "latents": "the final latents, relative to the range of the float model's: there is no VAE here",
        }[self.kind]

    @torch.no_grad()
    def images(self, sample: Tensor) -> Tensor:
        """float32 [B, C, H, W] of finished samples [B, ...]; in about [-1, 1] unless they are latents."""
        latents = self.family.latents(self.config, sample).float()
        if self.vae is None:
            return latents
        # One at a time: at full size the decoder's maps are the largest of the pipeline.
        return torch.cat([self.vae.decode(self._scaled(one)).sample.float() for one in latents.split(1)])

    def psnr(self, found: Tensor, expected: Tensor) -> float:
        """Peak signal-to-noise ratio in dB of images, 10 log10(peak^2 / mse): the peak is 2, of latents the range that the expected ones span."""
        if self.kind == "latents":
            peak = max(float(expected.max() - expected.min()), torch.finfo(torch.float32).tiny)
        else:
            peak, found, expected = 2.0, found.clamp(-1, 1), expected.clamp(-1, 1)
        mse = float((found.double() - expected.double()).pow(2).mean()) * (2 / peak) ** 2
        return -10 * math.log10(max(mse, SMALLEST_MSE) / 4)

    def visible(self, images: Tensor, expected: Tensor) -> Tensor:
        """Images as they can be looked at, [-1, 1]; of latents three channels, spread as the expected ones are."""
        if self.kind != "latents":
            return images
        low, high = expected[:, :3].amin(), expected[:, :3].amax()
        return (images[:, :3] - low) / (high - low).clamp(min=1e-12) * 2 - 1

    def _scaled(self, latents: Tensor) -> Tensor:
        """Latents as the decoder takes them; what walks is of about unit variance."""
        config = self.vae.config
        scaled = latents / float(config.get("scaling_factor") or 1.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            return scaled * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
        return scaled + float(config.get("shift_factor") or 0.0)


def decoder_of(source: Source) -> Decoder:
    """The decoder of a model's samples, its VAE loaded where the source pipeline has one.

    Raises:
        ArtifactError: The VAE cannot be read.
    """
    family, config = source.family_object, source.config
    named = source.pipeline.get(INDEX, {}).get(VAE)
    if named and source.directory is not None and (source.directory / VAE).is_dir():
        return Decoder(kind="decoded", family=family, config=config, vae=_vae(source.directory / VAE, str(named[1])))
    channels = family.latent_shape(config)[0]
    return Decoder(kind="pixels" if not named and channels in PIXEL_CHANNELS else "latents", family=family, config=config)


def _vae(directory: Path, class_name: str) -> Any:
    try:
        vae = getattr(diffusers, class_name).from_pretrained(
            directory, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as err:
        raise ArtifactError(f"{directory} cannot be read as {class_name}: {first_line(err)}. Download or save the pipeline again.") from err
    return vae.eval().requires_grad_(False)

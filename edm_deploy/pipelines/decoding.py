"""Convert final samples to images and back: pixels, latents decoded by the pipeline's VAE, or the latents themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from edm_deploy.errors import ArtifactError, first_line
from edm_deploy.network.family import Config, Family
from edm_deploy.pipelines.source import Source
from edm_deploy.storage.directories import INDEX_FILE
from edm_deploy.storage.variants import variant_of

ImageKind = Literal["pixels", "decoded", "latents"]
VAE = "vae"
PIXEL_CHANNELS = (1, 3)
SMALLEST_MSE = 0.25e-12  # in units of the squared peak: keeps the PSNR of identical images finite, 126 dB


def decibels(mean_squared_errors: Tensor) -> Tensor:
    """PSNR in dB, 10 log10(peak^2 / mse), of mean squared errors of any shape in units of the squared peak."""
    return -10 * mean_squared_errors.clamp(min=SMALLEST_MSE).log10()


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Converts final samples to images.

    Attributes:
        kind: `pixels` of a pixel-space model, latents `decoded` by the VAE, or `latents` if there is no VAE.
        family: Family of the model.
        config: Config of the model.
        vae: diffusers' VAE in float32, for `decoded`; else None.
    """

    kind: ImageKind
    family: Family
    config: Config
    vae: Any = None  # diffusers ships no types

    @property
    def words(self) -> str:
        """The images that are compared, as a phrase."""
        return {
            "pixels": "the samples, clamped to [-1, 1]",
            "decoded": "the images that the pipeline's VAE decodes, clamped to [-1, 1]",
            "latents": "the final latents, relative to the range of the float model's, because there is no VAE",
        }[self.kind]

    @torch.no_grad()
    def images(self, sample: Tensor) -> Tensor:
        """Images, float32 [B, C, H, W], of final samples [B, ...]; in about [-1, 1] unless they are latents."""
        latents = self.family.latents(self.config, sample).float()
        if self.vae is None:
            return latents
        # One at a time: at full size the decoder has the largest activations of the pipeline.
        return torch.cat([self.vae.decode(self._scaled(one)).sample.float() for one in latents.split(1)])  # type: ignore[no-untyped-call]  # untyped in torch

    @torch.no_grad()
    def sample_of(self, images: Tensor) -> Tensor:
        """The samples that `images` converts to these images, float32 [B, ...]: of an encoder's distribution the mode.

        Args:
            images: float32 [B, C, H, W] in [-1, 1].
        """
        if self.vae is None:
            return images
        encoded = [self.vae.encode(one) for one in images.split(1)]  # type: ignore[no-untyped-call]  # untyped in torch
        latents = torch.cat([each.latent_dist.mode() if hasattr(each, "latent_dist") else each.latents for each in encoded])
        return self._unscaled(latents.float())

    @property
    def pixels_per_sample(self) -> int:
        """Height of an image over the height of its sample."""
        if self.vae is None:
            return 1
        config = self.vae.config
        return int(2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1))

    def squared_errors(self, actual: Tensor, expected: Tensor) -> Tensor:
        """Mean squared error of each image, float64 [B], in units of the squared peak; the peak is 2, or the range of the expected latents."""
        if self.kind == "latents":
            peak = max(float(expected.max() - expected.min()), torch.finfo(torch.float32).tiny)
        else:
            peak, actual, expected = 2.0, actual.clamp(-1, 1), expected.clamp(-1, 1)
        return (actual.double() - expected.double()).pow(2).flatten(1).mean(1) / peak**2

    def psnr(self, actual: Tensor, expected: Tensor) -> float:
        """Peak signal-to-noise ratio of images in dB: that of their mean squared error."""
        return float(decibels(self.squared_errors(actual, expected).mean()))

    def visible(self, images: Tensor, expected: Tensor) -> Tensor:
        """Images for display, in [-1, 1]; of latents the first three channels, normalized by the range of the expected ones."""
        if self.kind != "latents":
            return images
        low, high = expected[:, :3].amin(), expected[:, :3].amax()
        return (images[:, :3] - low) / (high - low).clamp(min=1e-12) * 2 - 1

    def _scaled(self, latents: Tensor) -> Tensor:
        """Latents in the decoder's units; in sampling their variance is about 1."""
        scaled = latents / self._factor
        if (spread := self._spread(latents)) is not None:
            mean, std = spread
            return scaled * std + mean
        return scaled + self._shift

    def _unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `_scaled`."""
        if (spread := self._spread(latents)) is not None:
            mean, std = spread
            return (latents - mean) / std * self._factor
        return (latents - self._shift) * self._factor

    @property
    def _factor(self) -> float:
        return float(self.vae.config.get("scaling_factor") or 1.0)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)

    def _spread(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the decoder's latents, [1, C, 1, 1] each, where the VAE states them."""
        mean, std = self.vae.config.get("latents_mean"), self.vae.config.get("latents_std")
        if mean is None or std is None:
            return None
        return torch.tensor(mean).view(1, -1, 1, 1).to(like.device), torch.tensor(std).view(1, -1, 1, 1).to(like.device)


def decoder_of(source: Source) -> Decoder:
    """The decoder of a model's samples, with the VAE of the source pipeline if there is one.

    Raises:
        ArtifactError: The VAE cannot be read.
    """
    return decoder_at(source.directory, source.pipeline.get(INDEX_FILE, {}), source.family_object, source.config)


def decoder_at(directory: Path | None, index: Mapping[str, Any], family: Family, config: Config) -> Decoder:
    """The decoder of a model's samples, with the VAE of a pipeline if there is one.

    Args:
        directory: Directory of the pipeline's components; None where there is none.
        index: The pipeline's model_index.json.
        family: Family of the model.
        config: Config of the model.

    Raises:
        ArtifactError: The VAE cannot be read.
    """
    named = index.get(VAE)
    if named and directory is not None and (directory / VAE).is_dir():
        return Decoder(kind="decoded", family=family, config=config, vae=_vae(directory / VAE, str(named[1])))
    channels = family.latent_shape(config)[0]
    return Decoder(kind="pixels" if not named and channels in PIXEL_CHANNELS else "latents", family=family, config=config)


def _vae(directory: Path, class_name: str) -> Any:
    try:
        vae = getattr(diffusers, class_name).from_pretrained(
            directory, variant=variant_of(directory), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as err:
        raise ArtifactError(f"{directory} cannot be read as {class_name}: {first_line(err)}. Download or save the pipeline again.") from err
    return vae.eval().requires_grad_(False)

"""The common part of the transformer families: their 8-bit layers, and float32 position embeddings that trace for any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from edm_deploy.models._diffusers import DiffusersFamily
from edm_deploy.network.family import Config
from edm_deploy.network.placement import PlacementRule

TOKENS = "encoder_hidden_states"
POOLED = "pooled_projections"
SINCOS_BASE = 10000.0

EMBEDDER = PlacementRule(
    r"(time_text_embed|timestep_embedder)\b", "w8a8", "one row per sample, few weights, and the embedded timestep enters every block"
)
MODULATION = PlacementRule(
    r"(adaln_single|norm\w*)\.linear$|^proj_out_1$",
    "w8a8",
    "one row per sample, so that it takes little time, and its output scales and shifts every token of its block",
)
ADAPTER = "a LoRA of an engine is weighted by its set_adapters, and IP-Adapters are not supported"
CONTROLNET = "ControlNet's residuals enter between the blocks of a float model"


class TransformerFamily(DiffusersFamily):
    """A diffusers transformer. Sites are every Linear and the patch convolution; the first and last layer and the timestep's layers are W8A8."""

    component = "transformer"
    output_class = Transformer2DModelOutput
    renamed: ClassVar[Mapping[str, str]] = {"hidden_states": "sample"}

    def size_multiple(self, config: Config) -> int:
        return int(config["patch_size"])


def ends(first: str, last: str) -> PlacementRule:
    """The rule of the first and the last layer, whose names are the regular expressions `first` and `last`."""
    reason = "the first and last layer read and write the sample itself, so that their rounding error is visible in it"
    return PlacementRule(rf"^({first}|{last})$", "w8a8", reason)


class Patches(nn.Module):
    """A diffusers PatchEmbed that traces once for any height and width, with positions computed in float32.

    diffusers branches on whether the size is the model's sample size, computes in float64 (which several engines do not support), and stores the
    positions in a buffer that no checkpoint holds.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5; Peebles and Xie, arXiv 2212.09748, section 3.2 (positions scaled to the trained grid).
    """

    def __init__(self, embed: Any) -> None:  # a diffusers PatchEmbed
        super().__init__()
        self.proj = embed.proj
        self.base = float(embed.base_size) / float(embed.interpolation_scale)

    def forward(self, latent: Tensor) -> Tensor:
        """Tokens [B, H/p * W/p, D] of latents [B, C, H, W]."""
        tokens: Tensor = self.proj(latent)
        dim, height, width = tokens.shape[1:]
        rows, columns = self._sincos(height, dim, latent.device), self._sincos(width, dim, latent.device)
        across, down = columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)
        positions = torch.cat([across, down], dim=-1).reshape(1, height * width, dim)
        return (tokens.flatten(2).transpose(1, 2) + positions).to(latent.dtype)

    def _sincos(self, size: int, dim: int, device: torch.device) -> Tensor:
        """float32 [size, dim / 2]."""
        # Computed in Python: a buffer would be empty in the meta model that is traced, and float64 operators would remain in the graph.
        frequencies = torch.tensor([SINCOS_BASE ** (-k / (dim // 4)) for k in range(dim // 4)], dtype=torch.float32, device=device)
        steps = torch.arange(size, dtype=torch.float32, device=device)
        angles = (steps / (steps[-1:] + 1) * self.base)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class CroppedPatches(nn.Module):
    """A diffusers PatchEmbed that crops stored positions to their center, and traces once for any height and width up to theirs.

    Source: Esser et al., arXiv 2403.03206, section 5.3.2 (positional encodings, cropped from the largest grid).
    """

    pos_embed: Tensor

    def __init__(self, embed: Any) -> None:  # a diffusers PatchEmbed
        super().__init__()
        self.proj = embed.proj
        self.largest = int(embed.pos_embed_max_size)
        self.register_buffer("pos_embed", embed.pos_embed)

    def forward(self, latent: Tensor) -> Tensor:
        """Tokens [B, H/p * W/p, D] of latents [B, C, H, W]."""
        tokens: Tensor = self.proj(latent)
        height, width = tokens.shape[2:]
        rows, columns = self._middle(height, latent.device), self._middle(width, latent.device)
        # One gather from a flat table: a slice whose start depends on the size would bind the trace to one parity of the size.
        index = (rows[:, None] * self.largest + columns[None]).reshape(-1)
        return (tokens.flatten(2).transpose(1, 2) + self.pos_embed[:, index]).to(latent.dtype)

    def _middle(self, size: int, device: torch.device) -> Tensor:
        return (self.largest - size) // 2 + torch.arange(size, device=device)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Assemble patches [B, height * width, patch * patch * C] into an image [B, C, height * patch, width * patch]."""
    channels = tokens.shape[-1] // patch**2
    grid = tokens.reshape(-1, height, width, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height * patch, width * patch)

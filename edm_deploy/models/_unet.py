"""The common part of the UNet families: their 8-bit layers and their size multiple."""

from __future__ import annotations

from edm_deploy.models._diffusers import DiffusersFamily
from edm_deploy.network.family import Config
from edm_deploy.network.placement import PlacementRule

ENDS = PlacementRule(
    r"^conv_(in|out)$", "w8a8", "the first and last layer read and write the sample itself, so that their rounding error is visible in it"
)
EMBEDDINGS = PlacementRule(r"^(time|class|add)_embedding\.", "w8a8", "few weights, and their output enters every block")
SHORTCUTS = PlacementRule(
    r"\bconv_shortcut\b", "w8a8", "few weights, and they bypass a block, so that no later layer corrects their rounding error"
)


class UNetFamily(DiffusersFamily):
    """A diffusers UNet. Sites are every Conv2d and Linear; the first and last convolution, the embeddings and the 1x1 shortcuts are W8A8.

    The shortcuts are 4 % of the reference model's multiply-accumulates, 3 % of Stable Diffusion 1.5's and 1 % of SDXL's.

    Source: EfficientDM, arXiv 2310.03270, section 5.1 (first and last layer and embeddings at 8 bits); its released code, github.com/ThisisBillhe/EfficientDM
    at 293e212, leaves the shortcuts in floating point.
    """

    rules = (ENDS, EMBEDDINGS, SHORTCUTS)

    def size_multiple(self, config: Config) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))  # every level but the last halves the feature map

    def time_only(self, config: Config) -> str | None:
        # Where a label or SDXL's sizes are added to the time embedding, what reads the sum is no function of the timestep alone.
        return r"^time_embedding\." if mixes_conditioning(config) else r"^time_embedding\.|\.time_emb_proj$"


def mixes_conditioning(config: Config) -> bool:
    """Whether conditioning is added to the time embedding."""
    return any(config.get(key) is not None for key in ("class_embed_type", "num_class_embeds", "addition_embed_type"))

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
DOWNSAMPLERS = PlacementRule(
    r"\bdownsamplers\.", "w8a8", "a small part of the work, and everything below them and the skip connections read their output"
)


class UNetFamily(DiffusersFamily):
    """A diffusers UNet. Sites are every Conv2d and Linear; the first and last convolution, the embeddings, shortcuts and downsamplers are W8A8.

    On the reference model at W4A4, `mse`, 16 images of each of three seeds, W8A8 shortcuts (4 % of the multiply-accumulates) raise the mean PSNR from 19.1 to
    24.4 dB, and W8A8 downsamplers (2 %) to 24.8 dB.

    Source: EfficientDM, arXiv 2310.03270, section 5.1 (first and last layer and embeddings at 8 bits); its released code, github.com/ThisisBillhe/EfficientDM
    at 293e212, leaves shortcuts and the samplers' convolutions (`op`) in floating point.
    """

    rules = (ENDS, EMBEDDINGS, SHORTCUTS, DOWNSAMPLERS)

    def size_multiple(self, config: Config) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))  # every level but the last halves the feature map

    def time_only(self, config: Config) -> str | None:
        # Where a label or SDXL's sizes are added to the time embedding, what reads the sum is no function of the timestep alone.
        return r"^time_embedding\." if mixes_conditioning(config) else r"^time_embedding\.|\.time_emb_proj$"


def mixes_conditioning(config: Config) -> bool:
    """Whether conditioning is added to the time embedding."""
    return any(config.get(key) is not None for key in ("class_embed_type", "num_class_embeds", "addition_embed_type"))

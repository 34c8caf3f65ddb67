"""What the UNet families share: their 8-bit layers, and the sizes that their levels take."""

from __future__ import annotations

from edm_deploy.models._diffusers import DiffusersFamily
from edm_deploy.network.family import Config, PlacementRule

ENDS = PlacementRule(r"^conv_(in|out)$", "w8a8", "the first and last layer see the sample itself: their rounding is seen in it")
EMBEDDINGS = PlacementRule(r"^(time|class|add)_embedding\.", "w8a8", "few weights, and every block depends on their output")


class UNetFamily(DiffusersFamily):
    """A diffusers UNet. Sites: every Conv2d and Linear; first and last convolution, time and label embedding stay at W8A8.

    Source: EfficientDM, arXiv 2310.03270, section 5.1 (which layers stay at 8 bit).
    """

    rules = (ENDS, EMBEDDINGS)

    def size_multiple(self, config: Config) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))  # every level but the last halves the map once

    def time_only(self, config: Config) -> str | None:
        # A label or SDXL's sizes are added to the time embedding: from there on nothing is a function of the timestep alone.
        return r"^time_embedding\." if mixes_conditioning(config) else r"^time_embedding\.|\.time_emb_proj$"


def mixes_conditioning(config: Config) -> bool:
    """Whether something else is added to the time embedding."""
    return any(config.get(key) is not None for key in ("class_embed_type", "num_class_embeds", "addition_embed_type"))

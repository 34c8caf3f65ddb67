"""What a picture shows, as a vector: features of a small network of our own that was trained to tell CIFAR-10's classes apart."""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from edm_deploy_tools.common.assets import ASSETS

WEIGHTS = ASSETS / "features-cifar10" / "features.safetensors"
SIZE = 32  # pixels, height and width that the network was trained at
WIDTHS = (48, 128, 256)  # channels at 16, 8 and 4 pixels
CLASSES = 10
BATCH = 256


class FeatureNetwork(nn.Module):
    """Five convolutions, two of them residual, and a classifier that only training needs.

    Args:
        normalized: With the batch norms that it is trained with; what is shipped has them folded into the convolutions.
    """

    def __init__(self, *, normalized: bool = False) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.stem = _convolution(3, first, normalized, size=4, stride=2)
        self.residual = _convolution(first, first, normalized)
        self.middle = _convolution(first, second, normalized)
        self.middle_residual = _convolution(second, second, normalized)
        self.last = _convolution(second, third, normalized)
        self.classifier = nn.Linear(third, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """float32 [N, 256]: each channel's mean over an image; `images` float32 [N, 3, 32, 32] in [-1, 1]."""
        x = functional.relu(self.stem(images))
        x = x + functional.relu(self.residual(x))
        x = functional.relu(self.middle(functional.max_pool2d(x, 2)))
        x = x + functional.relu(self.middle_residual(x))
        mean: Tensor = functional.relu(self.last(functional.max_pool2d(x, 2))).mean((2, 3))
        return mean

    def forward(self, images: Tensor) -> Tensor:
        """float32 [N, 10]: logits of the classes."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _convolution(inputs: int, outputs: int, normalized: bool, *, size: int = 3, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=1, bias=not normalized)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs)) if normalized else convolution


@cache
def shipped_network() -> FeatureNetwork:
    """The network in assets/features-cifar10, in float32."""
    network = FeatureNetwork()
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features_of(images: Tensor) -> Tensor:
    """float32 [N, 256] of the shipped network.

    Args:
        images: float [N, C, H, W] in [-1, 1], C 1 or 3; other sizes than 32 are scaled to it, smoothed where that is smaller.
    """
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    pieces = []
    for piece in images.float().split(BATCH):
        if piece.shape[2:] != (SIZE, SIZE):
            piece = functional.interpolate(piece, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        pieces.append(shipped_network().features(piece))
    return torch.cat(pieces)

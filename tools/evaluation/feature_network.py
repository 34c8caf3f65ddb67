"""Feature vectors of images, from a small network trained to classify CIFAR-10."""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from edm_deploy_tools.common.assets import ASSETS

WEIGHTS = ASSETS / "features-cifar10" / "features.safetensors"
SIZE = 32  # pixels, height and width of the training images
WIDTHS = (48, 128, 256)  # channels at 16, 8 and 4 pixels
CLASSES = 10
BATCH = 256


class FeatureNetwork(nn.Module):
    """Five convolutions, two of them residual, and a classifier that only training needs.

    Args:
        normalized: Whether convolutions are followed by batch norms, as in training; in the shipped network they are folded into the convolutions.
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
        """Mean of each channel over an image, float32 [N, 256]; `images` is float32 [N, 3, 32, 32] in [-1, 1]."""
        x = functional.relu(self.stem(images))
        x = x + functional.relu(self.residual(x))
        x = functional.relu(self.middle(functional.max_pool2d(x, 2)))
        x = x + functional.relu(self.middle_residual(x))
        mean: Tensor = functional.relu(self.last(functional.max_pool2d(x, 2))).mean((2, 3))
        return mean

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, float32 [N, 10]."""
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
    """Features of the shipped network, float32 [N, 256].

    Args:
        images: float [N, C, H, W] in [-1, 1], with C 1 or 3. Sizes other than 32 are resized to 32, with antialiasing.
    """
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    pieces = []
    for piece in images.float().split(BATCH):  # type: ignore[no-untyped-call]  # untyped in torch
        if piece.shape[2:] != (SIZE, SIZE):
            piece = functional.interpolate(piece, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        pieces.append(shipped_network().features(piece))
    return torch.cat(pieces)

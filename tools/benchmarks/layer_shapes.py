"""Shapes of the layers that the kernels are measured on, and the number of layers of each shape in its model.

Contains every shape with 1 % or more of a model's multiply-accumulates, and one of each smaller kind. A test compares the tables with the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """Shape of a Conv2d or Linear, for one sample.

    Attributes:
        op: `conv` or `linear`.
        C, K: Input and output channels.
        H, W: Height and width of the input; for a Linear the number of tokens and 1.
        R: Height and width of the filter; the padding is R // 2.
        stride: Stride of both axes.
        uses: Number of layers of the model with this shape.
    """

    op: Literal["conv", "linear"]
    C: int
    K: int
    H: int
    W: int
    R: int
    stride: int
    uses: int

    @property
    def P(self) -> int:  # noqa: N802  # as in cuda/params.h
        """Height of the output."""
        return (self.H + 2 * (self.R // 2) - self.R) // self.stride + 1

    @property
    def Q(self) -> int:  # noqa: N802
        """Width of the output."""
        return (self.W + 2 * (self.R // 2) - self.R) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return self.C * self.K * self.R * self.R * self.P * self.Q

    def __str__(self) -> str:
        if self.op == "linear":
            return f"linear {self.C}->{self.K}, {self.H} tokens"
        return f"conv {self.R}x{self.R} {self.C}->{self.K}, {self.H}x{self.W}" + (f" stride {self.stride}" if self.stride > 1 else "")


BATCHES = {
    "reference": (2, 8, 16),
    "ldm4-imagenet": (2, 8, 16),
    "sd15": (2, 8, 16),
    "sdxl": (2,),
    "flux1-schnell": (1,),
}  # batch sizes of the measurements
LAYERS: dict[str, tuple[Layer, ...]] = {
    # 96 % of the model's multiply-accumulates.
    "reference": (
        Layer("conv", 64, 64, 32, 32, 3, 1, 4),
        Layer("conv", 128, 128, 16, 16, 3, 1, 4),
        Layer("conv", 128, 128, 32, 32, 3, 1, 1),
        Layer("conv", 192, 64, 32, 32, 3, 1, 1),
        Layer("conv", 128, 128, 8, 8, 3, 1, 8),
        Layer("conv", 256, 128, 16, 16, 3, 1, 1),
        Layer("conv", 128, 64, 32, 32, 3, 1, 1),
        Layer("conv", 192, 128, 16, 16, 3, 1, 1),
        Layer("linear", 128, 128, 256, 1, 1, 1, 12),
        Layer("conv", 256, 128, 8, 8, 3, 1, 2),
        Layer("conv", 64, 128, 16, 16, 3, 1, 1),
        Layer("conv", 192, 64, 32, 32, 1, 1, 1),
        Layer("conv", 128, 128, 16, 16, 3, 2, 1),
        Layer("conv", 256, 128, 16, 16, 1, 1, 1),
        Layer("linear", 256, 128, 1, 1, 1, 1, 8),
    ),
    # 93 % of the model's multiply-accumulates.
    "ldm4-imagenet": (
        Layer("conv", 192, 192, 64, 64, 3, 1, 7),
        Layer("conv", 384, 384, 32, 32, 3, 1, 6),
        Layer("linear", 384, 3072, 1024, 1, 1, 1, 5),
        Layer("conv", 384, 384, 64, 64, 3, 1, 1),
        Layer("conv", 384, 192, 64, 64, 3, 1, 2),
        Layer("conv", 960, 960, 8, 8, 3, 1, 10),
        Layer("conv", 576, 576, 16, 16, 3, 1, 6),
        Layer("linear", 384, 384, 1024, 1, 1, 1, 30),
        Layer("conv", 576, 192, 64, 64, 3, 1, 1),
        Layer("linear", 576, 4608, 256, 1, 1, 1, 5),
        Layer("conv", 960, 384, 32, 32, 3, 1, 1),
        Layer("conv", 576, 576, 32, 32, 3, 1, 1),
        Layer("linear", 1536, 384, 1024, 1, 1, 1, 5),
        Layer("linear", 960, 7680, 64, 1, 1, 1, 6),
        Layer("conv", 768, 384, 32, 32, 3, 1, 1),
        Layer("linear", 576, 576, 256, 1, 1, 1, 30),
        Layer("linear", 960, 960, 64, 1, 1, 1, 36),
        Layer("conv", 1920, 960, 8, 8, 3, 1, 2),
        Layer("conv", 960, 960, 16, 16, 3, 1, 1),
        Layer("conv", 1536, 576, 16, 16, 3, 1, 1),
        Layer("conv", 576, 384, 32, 32, 3, 1, 1),
        Layer("linear", 2304, 576, 256, 1, 1, 1, 5),
        Layer("conv", 1152, 576, 16, 16, 3, 1, 1),
        Layer("conv", 384, 384, 32, 32, 1, 1, 10),
        Layer("linear", 3840, 960, 64, 1, 1, 1, 6),
        Layer("conv", 960, 576, 16, 16, 3, 1, 1),
        Layer("conv", 576, 576, 16, 16, 1, 1, 10),
        Layer("linear", 512, 960, 77, 1, 1, 1, 12),
        Layer("conv", 384, 384, 32, 32, 3, 2, 1),
        Layer("linear", 768, 960, 1, 1, 1, 1, 7),
    ),
    # 95 % of the model's multiply-accumulates.
    "sd15": (
        Layer("conv", 320, 320, 64, 64, 3, 1, 7),
        Layer("conv", 1280, 1280, 16, 16, 3, 1, 7),
        Layer("conv", 640, 640, 32, 32, 3, 1, 6),
        Layer("linear", 320, 2560, 4096, 1, 1, 1, 5),
        Layer("linear", 640, 5120, 1024, 1, 1, 1, 5),
        Layer("linear", 1280, 10240, 256, 1, 1, 1, 5),
        Layer("conv", 2560, 1280, 16, 16, 3, 1, 2),
        Layer("conv", 1280, 1280, 32, 32, 3, 1, 1),
        Layer("conv", 640, 640, 64, 64, 3, 1, 1),
        Layer("conv", 640, 320, 64, 64, 3, 1, 2),
        Layer("linear", 320, 320, 4096, 1, 1, 1, 30),
        Layer("linear", 640, 640, 1024, 1, 1, 1, 30),
        Layer("linear", 1280, 1280, 256, 1, 1, 1, 30),
        Layer("conv", 1920, 640, 32, 32, 3, 1, 1),
        Layer("conv", 960, 320, 64, 64, 3, 1, 1),
        Layer("conv", 1280, 1280, 8, 8, 3, 1, 11),
        Layer("linear", 1280, 320, 4096, 1, 1, 1, 5),
        Layer("linear", 2560, 640, 1024, 1, 1, 1, 5),
        Layer("linear", 5120, 1280, 256, 1, 1, 1, 5),
        Layer("conv", 1280, 640, 32, 32, 3, 1, 1),
        Layer("conv", 2560, 1280, 8, 8, 3, 1, 3),
        Layer("conv", 1920, 1280, 16, 16, 3, 1, 1),
        Layer("conv", 960, 640, 32, 32, 3, 1, 1),
        Layer("conv", 320, 320, 64, 64, 1, 1, 10),
        Layer("conv", 640, 640, 32, 32, 1, 1, 10),
        Layer("conv", 1280, 1280, 16, 16, 1, 1, 10),
        Layer("conv", 2560, 1280, 16, 16, 1, 1, 2),
        Layer("conv", 1280, 1280, 16, 16, 3, 2, 1),
        Layer("linear", 768, 1280, 77, 1, 1, 1, 12),
        Layer("linear", 1280, 1280, 1, 1, 1, 1, 13),
    ),
    # 97 % of the model's multiply-accumulates.
    "sdxl": (
        Layer("linear", 1280, 10240, 1024, 1, 1, 1, 60),
        Layer("linear", 1280, 1280, 1024, 1, 1, 1, 372),
        Layer("linear", 5120, 1280, 1024, 1, 1, 1, 60),
        Layer("conv", 1280, 1280, 32, 32, 3, 1, 10),
        Layer("linear", 640, 5120, 4096, 1, 1, 1, 10),
        Layer("linear", 640, 640, 4096, 1, 1, 1, 70),
        Layer("conv", 320, 320, 128, 128, 3, 1, 7),
        Layer("conv", 640, 640, 64, 64, 3, 1, 6),
        Layer("linear", 2560, 640, 4096, 1, 1, 1, 10),
        Layer("conv", 2560, 1280, 32, 32, 3, 1, 2),
        Layer("conv", 1280, 1280, 64, 64, 3, 1, 1),
        Layer("conv", 640, 640, 128, 128, 3, 1, 1),
        Layer("conv", 640, 320, 128, 128, 3, 1, 2),
        Layer("conv", 1920, 640, 64, 64, 3, 1, 1),
        Layer("conv", 960, 320, 128, 128, 3, 1, 1),
        Layer("conv", 1280, 640, 64, 64, 3, 1, 1),
        Layer("linear", 2048, 1280, 77, 1, 1, 1, 120),
        Layer("conv", 640, 640, 64, 64, 3, 2, 1),
        Layer("linear", 1280, 1280, 1, 1, 1, 1, 9),
    ),
    # 99 % of the model's multiply-accumulates.
    "flux1-schnell": (
        Layer("linear", 15360, 3072, 4608, 1, 1, 1, 38),
        Layer("linear", 3072, 12288, 4608, 1, 1, 1, 38),
        Layer("linear", 3072, 3072, 4608, 1, 1, 1, 114),
        Layer("linear", 3072, 3072, 4096, 1, 1, 1, 76),
        Layer("linear", 3072, 12288, 4096, 1, 1, 1, 19),
        Layer("linear", 12288, 3072, 4096, 1, 1, 1, 19),
        Layer("linear", 3072, 3072, 512, 1, 1, 1, 76),
        Layer("linear", 3072, 12288, 512, 1, 1, 1, 19),
        Layer("linear", 12288, 3072, 512, 1, 1, 1, 19),
        Layer("linear", 3072, 18432, 1, 1, 1, 1, 38),
    ),
}

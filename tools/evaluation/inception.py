"""The Inception network of the published FID figures: pooled features, spatial features and class logits, from weights that the user provides.

Source: Szegedy et al., Rethinking the Inception Architecture, arXiv 1512.00567, as in TensorFlow's graph of 2015-12-05, which Heusel et al., arXiv 1706.08500,
compute the FID with. Names of the weights as in the port to torch, `pt_inception-2015-12-05-6726825d.pth` of github.com/mseitzer/pytorch-fid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from edm_deploy.errors import ArtifactError, first_line

PUBLISHED = "6726825d"  # first digits of the sha256 of the port's file, which are in its name
CONVERT = "python -m edm_deploy_tools.convert_inception"
CLASSES = 1008
SIZE = 299  # pixels, height and width of the network's input
SPATIAL_CHANNELS = 7  # of the map that the sFID compares. Source: Nash et al., arXiv 2103.03841
BATCH = 32


@dataclass(frozen=True)
class InceptionOutputs:
    """What the network computes of N images.

    Attributes:
        pooled: float32 [N, 2048].
        spatial: float32 [N, 2023]: 7 channels of 17 x 17 positions.
        logits: float32 [N, 1008], without the classifier's bias, as the published Inception scores use them.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Convolution(nn.Module):
    """A convolution without bias, a batch norm and a ReLU."""

    def __init__(
        self, inputs: int, outputs: int, size: int | tuple[int, int] = 1, *, stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, outputs, H, W]."""
        return functional.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Branches whose outputs are concatenated. A branch is a chain of convolutions by name, after a pooling or not; a step of two names runs both on one input.

    Args:
        branches: For each branch its steps.
        pool: Of the last branch: `average`, which does not count the padding, `maximum`, or `reduce`, a maximum of stride 2; it may have no step.
        convolutions: By name.
    """

    def __init__(self, branches: tuple[tuple[str | tuple[str, str], ...], ...], pool: str, convolutions: Mapping[str, Convolution]) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, sum of the branches' channels, H, W]."""
        outputs = []
        for index, steps in enumerate(self.branches):
            y = self._pooled(x) if index == len(self.branches) - 1 else x
            for step in steps:
                names = (step,) if isinstance(step, str) else step
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return functional.max_pool2d(x, 3, stride=1, padding=1) if self.pool == "maximum" else functional.max_pool2d(x, 3, stride=2)


def _block_35(inputs: int, pooled: int) -> Branches:
    convolutions = {
        "branch1x1": Convolution(inputs, 64),
        "branch5x5_1": Convolution(inputs, 48),
        "branch5x5_2": Convolution(48, 64, 5, padding=2),
        "branch3x3dbl_1": Convolution(inputs, 64),
        "branch3x3dbl_2": Convolution(64, 96, 3, padding=1),
        "branch3x3dbl_3": Convolution(96, 96, 3, padding=1),
        "branch_pool": Convolution(inputs, pooled),
    }
    chains = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ("branch_pool",))
    return Branches(chains, "average", convolutions)


def _to_17(inputs: int) -> Branches:
    convolutions = {
        "branch3x3": Convolution(inputs, 384, 3, stride=2),
        "branch3x3dbl_1": Convolution(inputs, 64),
        "branch3x3dbl_2": Convolution(64, 96, 3, padding=1),
        "branch3x3dbl_3": Convolution(96, 96, 3, stride=2),
    }
    return Branches((("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ()), "reduce", convolutions)


def _row(inputs: int, outputs: int) -> Convolution:
    return Convolution(inputs, outputs, (1, 7), padding=(0, 3))


def _column(inputs: int, outputs: int) -> Convolution:
    return Convolution(inputs, outputs, (7, 1), padding=(3, 0))


def _block_17(width: int) -> Branches:
    convolutions = {
        "branch1x1": Convolution(768, 192),
        "branch7x7_1": Convolution(768, width),
        "branch7x7_2": _row(width, width),
        "branch7x7_3": _column(width, 192),
        "branch7x7dbl_1": Convolution(768, width),
        "branch7x7dbl_2": _column(width, width),
        "branch7x7dbl_3": _row(width, width),
        "branch7x7dbl_4": _column(width, width),
        "branch7x7dbl_5": _row(width, 192),
        "branch_pool": Convolution(768, 192),
    }
    doubled = tuple(f"branch7x7dbl_{number}" for number in range(1, 6))
    return Branches((("branch1x1",), ("branch7x7_1", "branch7x7_2", "branch7x7_3"), doubled, ("branch_pool",)), "average", convolutions)


def _to_8() -> Branches:
    convolutions = {
        "branch3x3_1": Convolution(768, 192),
        "branch3x3_2": Convolution(192, 320, 3, stride=2),
        "branch7x7x3_1": Convolution(768, 192),
        "branch7x7x3_2": _row(192, 192),
        "branch7x7x3_3": _column(192, 192),
        "branch7x7x3_4": Convolution(192, 192, 3, stride=2),
    }
    return Branches((("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{number}" for number in range(1, 5)), ()), "reduce", convolutions)


def _block_8(inputs: int, pool: str) -> Branches:
    convolutions = {
        "branch1x1": Convolution(inputs, 320),
        "branch3x3_1": Convolution(inputs, 384),
        "branch3x3_2a": Convolution(384, 384, (1, 3), padding=(0, 1)),
        "branch3x3_2b": Convolution(384, 384, (3, 1), padding=(1, 0)),
        "branch3x3dbl_1": Convolution(inputs, 448),
        "branch3x3dbl_2": Convolution(448, 384, 3, padding=1),
        "branch3x3dbl_3a": Convolution(384, 384, (1, 3), padding=(0, 1)),
        "branch3x3dbl_3b": Convolution(384, 384, (3, 1), padding=(1, 0)),
        "branch_pool": Convolution(inputs, 192),
    }
    chains = (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
        ("branch_pool",),
    )
    return Branches(chains, pool, convolutions)


class Inception(nn.Module):
    """The network. The last block pools by the maximum, as TensorFlow's graph does, and the averages do not count padding."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_35(192, 32), _block_35(256, 64), _block_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_block_17(width) for width in (128, 160, 160, 192))
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _to_8(), _block_8(1280, "average"), _block_8(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images: Tensor) -> InceptionOutputs:
        """Outputs of images, float32 [N, 3, 299, 299] in [-1, 1)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # TensorFlow's `mixed_6/conv`: the first convolution of this block, before its norm.
        spatial = self.Mixed_6d.get_submodule("branch1x1").conv(x)[:, :SPATIAL_CHANNELS]  # type: ignore[operator,union-attr]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))
        pooled = x.mean((2, 3))
        return InceptionOutputs(pooled, spatial.flatten(1), pooled @ self.fc.weight.T)


def load_inception(path: Path) -> Inception:
    """The network with the published weights.

    Args:
        path: What `python -m edm_deploy_tools.convert_inception` wrote.

    Raises:
        ArtifactError: It is missing, damaged, or not a conversion of the published file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
    except (OSError, safetensors.SafetensorError) as err:
        raise ArtifactError(f"{path} cannot be read as safetensors ({first_line(err)}). Write it with {CONVERT} FILE.pth {path}.") from err
    if not metadata.get("published_sha256", "").startswith(PUBLISHED) or metadata.get("weights_sha256") != weights_sha256(weights):
        raise ArtifactError(
            f"{path} does not hold the weights of pt_inception-2015-12-05-{PUBLISHED}.pth unchanged, so that its figures would compare with no others. "
            f"Write it with {CONVERT} FILE.pth {path}."
        )
    with torch.device("meta"):
        network = Inception()
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as err:
        raise ArtifactError(f"{path} has other weights than the network: {first_line(err)} Write it again with {CONVERT}.") from err
    return network.eval().requires_grad_(False)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """sha256 hex of tensors with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def outputs_of(network: Inception, images: Tensor) -> InceptionOutputs:
    """Outputs of images in [-1, 1], float [N, C, H, W] with C 1 or 3: rounded to 8 bits, resized as TensorFlow 1 does, and scaled to [-1, 1)."""
    rounded = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    parts = [network((resized(part.expand(-1, 3, -1, -1)) - 128) / 128) for part in torch.split(rounded, BATCH)]
    return InceptionOutputs(*(torch.cat([getattr(part, name) for part in parts]) for name in ("pooled", "spatial", "logits")))


def resized(images: Tensor) -> Tensor:
    """Bilinear to 299 x 299 by TensorFlow 1's rule, without antialiasing: output pixel i is at i * (input size / 299) of the input, and edges are repeated."""
    for axis in (2, 3):
        length = images.shape[axis]
        position = torch.arange(SIZE, dtype=torch.float32) * (length / SIZE)
        low = position.floor().long()
        high = (low + 1).clamp(max=length - 1)
        share = (position - low).reshape(-1, *[1] * (3 - axis))
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * share
    return images

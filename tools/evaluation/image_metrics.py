"""Metrics between two sets of images, in the features of the shipped network or of Inception: Frechet distance, sFID, IS, precision and recall."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy_tools.evaluation.feature_network import features_of
from edm_deploy_tools.evaluation.frechet import frechet_distance
from edm_deploy_tools.evaluation.inception import InceptionOutputs, load_inception, outputs_of
from edm_deploy_tools.images.dataset import load_images

METRICS = ("fid", "sfid", "is", "precision", "recall")
OWN = "features-cifar10"  # the shipped network
NEEDS_INCEPTION = ("sfid", "is")
NEIGHBOURS = 3  # Source: Kynkaanniemi et al., arXiv 1904.06991
SPLIT = 5000  # samples of one part of an Inception score. Source: Salimans et al., arXiv 1606.03498, ten parts of 50000


@dataclass(frozen=True, kw_only=True)
class MetricRequest:
    """Which metrics, in which features, against which images.

    Attributes:
        names: Of METRICS.
        inception: Weights of the Inception network; None uses the shipped network, whose figures have its name and compare with no published ones.
        images: Folder or parquet file of images to compare with; None compares with the float model's samples from the same noise.

    Raises:
        InputError: An unknown metric, or one that needs Inception without it.
        ArtifactError: A path does not exist.
    """

    names: tuple[str, ...]
    inception: Path | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in METRICS:
                raise InputError(f"--metrics has {name!r}; expected some of {', '.join(METRICS)}, separated by commas.")
            if name in NEEDS_INCEPTION and self.inception is None:
                raise InputError(
                    f"--metrics {name} needs the Inception network: name its weights with --inception FILE, or leave {name} out."
                )
        for path in (self.inception, self.images):
            if path is not None and not path.exists():
                raise ArtifactError(f"{path} does not exist. Check the path.")
        if not self.names:
            raise InputError(f"--metrics names none; expected some of {', '.join(METRICS)}, separated by commas.")

    def label(self, name: str) -> str:
        """The name of a figure in reports: `FID`, or `Frechet distance, features-cifar10`."""
        if self.inception is not None:
            return {"fid": "FID", "sfid": "sFID", "is": "IS"}.get(name, name)
        return f"{'Frechet distance' if name == 'fid' else name}, {OWN}"


class ImageMetrics:
    """Metrics of sets of images against one set.

    Args:
        request: Metrics and features.
        expected: float [N, C, H, W] in [-1, 1], unless the request names images.

    Raises:
        ArtifactError: The weights or the images cannot be read.
        InputError: Fewer images than the metrics need.
    """

    def __init__(self, request: MetricRequest, expected: Tensor) -> None:
        self.request = request
        if request.images is not None:
            expected = load_images(request.images, size=expected.shape[-1], label=None).float() / 127.5 - 1
        fewest = NEIGHBOURS + 1 if {"precision", "recall"} & set(request.names) else 2
        if len(expected) < fewest:
            raise InputError(
                f"--metrics {','.join(request.names)} needs {fewest} images or more, {len(expected)} given. Increase --samples."
            )
        self.outputs: Callable[[Tensor], InceptionOutputs] = _shipped
        if request.inception is not None:
            network = load_inception(request.inception)
            self.outputs = lambda images: outputs_of(network, images)
        self.expected = self.outputs(expected)

    def of(self, images: Tensor) -> dict[str, float]:
        """The figures of images, float [M, C, H, W] in [-1, 1], by their labels."""
        found = self.outputs(images.float())
        figures: dict[str, Callable[[], float]] = {
            "fid": lambda: frechet_distance(found.pooled, self.expected.pooled),
            "sfid": lambda: frechet_distance(found.spatial, self.expected.spatial),
            "is": lambda: inception_score(found.logits),
            "precision": lambda: covered(found.pooled, self.expected.pooled),
            "recall": lambda: covered(self.expected.pooled, found.pooled),
        }
        return {self.request.label(name): figures[name]() for name in self.request.names}


def _shipped(images: Tensor) -> InceptionOutputs:
    none = torch.zeros(len(images), 0)
    return InceptionOutputs(features_of(images), none, none)


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """`exp(mean KL(p(y|x) || p(y)))`, averaged over parts of at most `split` images: 1 to the number of classes.

    Args:
        logits: float [N, classes].
        split: Images of a part, the last one of which may be smaller.

    Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    scores = []
    for part in torch.split(logits.double().log_softmax(1), split):
        marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def covered(points: Tensor, manifold: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share of `points` that are within the distance of some point of `manifold` to its k-th nearest neighbour there: 0 to 1.

    Precision is that of generated images in the manifold of the real ones, recall that of real images in the manifold of the generated ones.

    Args:
        points: float [N, D].
        manifold: float [M, D], M > k.
        neighbours: k.

    Source: Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2.
    """
    manifold = manifold.double()
    # The nearest point is the point itself.
    radii = torch.cat([torch.cdist(part, manifold).kthvalue(neighbours + 1).values for part in torch.split(manifold, SPLIT)])
    inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in torch.split(points.double(), SPLIT)]
    return float(torch.cat(inside).double().mean())


def metric_names(text: str) -> tuple[str, ...]:
    """Names of `fid,precision`, each once, in this order."""
    return tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))

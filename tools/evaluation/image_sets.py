"""Metrics of sets of images that `generate` wrote, against another folder of images: no sampling, and as many images as there are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.storage.directories import read_json, write_json
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory
from edm_deploy_tools.common.machine import measurement_conditions
from edm_deploy_tools.evaluation.image_metrics import ImageMetrics, MetricRequest
from edm_deploy_tools.images.dataset import load_images
from edm_deploy_tools.images.shards import SET_FILE, read_set

REPORT_NAME = "metrics.json"
REPORT = DirectoryKind("metrics of sets of images", REPORT_NAME)


def are_image_sets(paths: Sequence[Path]) -> bool:
    """Whether the paths are sets of images rather than artifacts and engines.

    Raises:
        InputError: Some are and some are not.
    """
    sets = [(path / SET_FILE).is_file() for path in paths]
    if any(sets) and not all(sets):
        raise InputError(f"{paths[sets.index(False)]} is no set of images, {paths[sets.index(True)]} is one. Evaluate one kind at a time.")
    return any(sets)


def evaluate_image_sets(paths: Sequence[Path], out: Path, request: MetricRequest | None) -> list[dict[str, Any]]:
    """Measure sets of images, and write metrics.json into directory `out`; returns a row of figures for each set.

    Raises:
        InputError: No metrics or no images to compare with are named, or there are too few.
        ArtifactError: A set is not complete, or cannot be read.
    """
    if request is None or request.images is None:
        raise InputError("Sets of images are compared with a folder of images: add --metrics fid --images DIR.")
    check_output(out, kind=REPORT)
    size = _size(paths[0])
    metrics = ImageMetrics(request, torch.zeros(2, 3, size, size))
    rows = []
    for path in paths:
        described = read_json(path / SET_FILE, what="set of images")
        if not described.get("complete"):
            raise ArtifactError(f"{path} is not complete. Run edm-deploy generate again to complete it.")
        images = load_images(path, size=size, label=None)
        figures = metrics.of(images.float() / 127.5 - 1)
        rows.append({"set": str(path), "images": len(images), **figures, "settings": described["settings_digest"]})
    with new_directory(out, kind=REPORT) as directory:
        write_json(directory / REPORT_NAME, {"against": str(request.images), "sets": rows, "conditions": measurement_conditions()})
    return rows


def _size(path: Path) -> int:
    """Side of the images of a set in pixels; load_images crops them to squares."""
    for record in read_set(path):
        with Image.open(io.BytesIO(record.png)) as image:
            return min(image.size)
    raise ArtifactError(f"{path} holds no image. Run edm-deploy generate again to complete it.")

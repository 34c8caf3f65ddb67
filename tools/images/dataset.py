"""Training images, from a folder or from a parquet file of encoded images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.images.shards import SET_FILE, read_set

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_images(path: Path, *, size: int, label: int | None) -> Tensor:
    """Load images as uint8 [N, 3, size, size].

    Args:
        path: A parquet file with columns `img` (a struct with encoded `bytes`) and `label`, a folder of shards that `generate` wrote, or another folder,
            searched recursively.
        size: Height and width in pixels, after a centre crop to a square.
        label: Class to load from a parquet file or from shards; None loads all.

    Raises:
        ArtifactError: The path does not exist, cannot be read, or holds no image.
    """
    if (path / SET_FILE).is_file():
        images = [_decode(record.png, path) for record in read_set(path) if label is None or record.label == label]
    elif path.is_dir():
        images = [_read(entry) for entry in sorted(path.rglob("*")) if entry.suffix.lower() in IMAGE_SUFFIXES]
    elif path.suffix == ".parquet" and path.is_file():
        images = [_decode(data, path) for data in _parquet_bytes(path, label)]
    else:
        raise ArtifactError(f"{path} is neither a folder of images nor a parquet file. Check the path.")
    if not images:
        raise ArtifactError(f"{path} holds no image{'' if label is None else f' of class {label}'}; expected {', '.join(IMAGE_SUFFIXES)}.")
    return torch.stack([torch.from_numpy(np.array(_square(image, size))).permute(2, 0, 1) for image in images])


def _parquet_bytes(path: Path, label: int | None) -> list[bytes]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as err:
        raise ArtifactError(f'{path} needs pyarrow to be read. Install it with pip install "edm-deploy[train]".') from err
    try:
        table = parquet.read_table(path, columns=["img", "label"])
        entries = zip(table.column("img").to_pylist(), table.column("label").to_pylist(), strict=True)
        return [image["bytes"] for image, image_label in entries if label is None or image_label == label]
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise ArtifactError(
            f"{path} cannot be read ({err}). Expected a parquet file with columns img (a struct with bytes) and label."
        ) from err


def _read(path: Path) -> Image.Image:
    return _decode(path.read_bytes(), path)


def _decode(data: bytes, path: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as err:
        raise ArtifactError(f"{path} holds an image that cannot be read ({err}). Remove it.") from err


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS if side != size else None)

"""Training pictures: from a folder, or from a parquet file of encoded ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from edm_deploy.errors import ArtifactError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_pictures(path: Path, *, size: int, label: int | None) -> Tensor:
    """Pictures as uint8 [N, 3, size, size].

    Args:
        path: A parquet file with columns `img` (a struct with encoded `bytes`) and `label`, or a folder of pictures, searched through.
        size: Pictures are cut to a square around their middle and scaled to this.
        label: Only this class, of a parquet file; None takes all.

    Raises:
        ArtifactError: Nothing there, or no picture in it.
    """
    if path.is_dir():
        found = [_read(entry) for entry in sorted(path.rglob("*")) if entry.suffix.lower() in PICTURES]
    elif path.suffix == ".parquet" and path.is_file():
        found = [_decode(data, path) for data in _parquet_bytes(path, label)]
    else:
        raise ArtifactError(f"{path} is neither a folder of pictures nor a parquet file. Check the path.")
    if not found:
        raise ArtifactError(f"{path} holds no picture{'' if label is None else f' of class {label}'}; expected {', '.join(PICTURES)}.")
    return torch.stack([torch.from_numpy(np.array(_square(picture, size))).permute(2, 0, 1) for picture in found])


def _parquet_bytes(path: Path, label: int | None) -> list[bytes]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as err:
        raise ArtifactError(f'{path} needs pyarrow to be read. Install it with pip install "edm-deploy[train]".') from err
    try:
        table = parquet.read_table(path, columns=["img", "label"])
        entries = zip(table.column("img").to_pylist(), table.column("label").to_pylist(), strict=True)
        return [picture["bytes"] for picture, found in entries if label is None or found == label]
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
        raise ArtifactError(f"{path} holds a picture that cannot be read ({err}). Remove it.") from err


def _square(picture: Image.Image, size: int) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS if side != size else None)

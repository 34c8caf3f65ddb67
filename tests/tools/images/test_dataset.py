from __future__ import annotations

import pytest
import torch
from PIL import Image

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.images.dataset import load_images


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "below").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "images" / "a.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "images" / "below" / "b.jpg")
    return tmp_path / "images"


def test_images_are_cropped_to_a_square_and_resized(folder):
    images = load_images(folder, size=8, label=None)
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images[0, :, 0, 0].tolist() == [255, 0, 0]


def test_a_parquet_file_is_read_by_class(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files are read with pyarrow")
    from pyarrow import parquet

    data = (folder / "a.png").read_bytes()
    entries = [{"bytes": data, "path": None}] * 3
    parquet.write_table(pyarrow.table({"img": entries, "label": [0, 1, 1]}), tmp_path / "data.parquet")
    assert len(load_images(tmp_path / "data.parquet", size=8, label=1)) == 2
    assert len(load_images(tmp_path / "data.parquet", size=8, label=None)) == 3
    with pytest.raises(ArtifactError, match="no image of class 7"):
        load_images(tmp_path / "data.parquet", size=8, label=7)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no image"):
        load_images(tmp_path, size=8, label=None)
    with pytest.raises(ArtifactError, match="neither a folder"):
        load_images(tmp_path / "nothing", size=8, label=None)

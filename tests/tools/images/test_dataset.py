from __future__ import annotations

import pytest
import torch
from PIL import Image

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.images.dataset import load_pictures


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "pictures" / "a.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "pictures" / "below" / "b.jpg")
    return tmp_path / "pictures"


def test_pictures_are_cut_square_and_scaled(folder):
    pictures = load_pictures(folder, size=8, label=None)
    assert pictures.shape == (2, 3, 8, 8)
    assert pictures.dtype == torch.uint8
    assert pictures[0, :, 0, 0].tolist() == [255, 0, 0]


def test_a_parquet_file_is_read_by_class(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files are read with pyarrow")
    from pyarrow import parquet

    data = (folder / "a.png").read_bytes()
    entries = [{"bytes": data, "path": None}] * 3
    parquet.write_table(pyarrow.table({"img": entries, "label": [0, 1, 1]}), tmp_path / "data.parquet")
    assert len(load_pictures(tmp_path / "data.parquet", size=8, label=1)) == 2
    assert len(load_pictures(tmp_path / "data.parquet", size=8, label=None)) == 3
    with pytest.raises(ArtifactError, match="no picture of class 7"):
        load_pictures(tmp_path / "data.parquet", size=8, label=7)


def test_no_pictures_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no picture"):
        load_pictures(tmp_path, size=8, label=None)
    with pytest.raises(ArtifactError, match="neither a folder"):
        load_pictures(tmp_path / "nothing", size=8, label=None)

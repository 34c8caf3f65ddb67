from __future__ import annotations

import pytest
import torch
from PIL import Image

from edm_deploy.errors import ArtifactError, InputError
from edm_deploy_tools.pictures import load_pictures
from edm_deploy_tools.train_reference import Settings, Training, rate_factor

SMALL = Settings(size=8, channels=(8, 16), steps=4, batch=2)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "pictures" / "a.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "pictures" / "below" / "b.jpg")
    return tmp_path / "pictures"


def training() -> Training:
    from diffusers import DDIMScheduler

    return Training(SMALL, DDIMScheduler(), torch.device("cpu"))


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


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(folder, tmp_path):
    pictures = load_pictures(folder, size=8, label=None)
    straight, first, second = training(), training(), training()
    losses = [straight.step(number, pictures) for number in range(4)]
    for number in range(2):
        first.step(number, pictures)
    first.save(tmp_path / "state", 2)
    assert second.load(tmp_path / "state") == 2
    assert [second.step(number, pictures) for number in (2, 3)] == losses[2:]
    for a, b in zip(straight.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_rises_and_then_falls_to_zero():
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[0] == 0.5
    assert max(factors) == 1.0
    assert factors[-1] < 0.01


def test_a_size_between_the_levels_is_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        Settings(size=30)

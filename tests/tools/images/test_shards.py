from __future__ import annotations

import io
import json
import tarfile

import pytest
from pyarrow import parquet

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.images import shards
from edm_deploy_tools.images.shards import ImageRecord, ShardRange, fault_of, read_set, read_shard, shard_files, shard_ranges, write_shard


def records(start, stop):
    return [
        ImageRecord(index=index, seed=100 + index, engine="e", settings="s", prompt="a cat", png=b"png %d" % index)
        for index in range(start, stop)
    ]


def test_the_last_shard_has_the_rest():
    assert shard_ranges(10, 4) == [ShardRange(0, 4), ShardRange(4, 8), ShardRange(8, 10)]
    assert ShardRange(4, 8).name("webdataset") == "images-000000004-000000008.tar"


@pytest.mark.parametrize("shard_format", shards.FORMATS)
def test_a_shard_is_read_as_it_was_written_and_its_bytes_repeat(tmp_path, shard_format):
    made = records(4, 8)
    paths = [tmp_path / name / ShardRange(4, 8).name(shard_format) for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        write_shard(path, made, shard_format)
    assert list(read_shard(paths[0])) == made
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [path.name for path in paths[0].parent.iterdir()] == [paths[0].name]
    assert fault_of(paths[0], ShardRange(4, 8), "s") is None


def test_a_tar_is_in_the_format_of_webdataset(tmp_path):
    write_shard(tmp_path / "images.tar", records(0, 2), "webdataset")
    with tarfile.open(tmp_path / "images.tar") as archive:
        assert archive.getnames() == ["000000000.json", "000000000.png", "000000001.json", "000000001.png"]
        fields = json.loads(archive.extractfile("000000001.json").read())
    assert fields == {"index": 1, "seed": 101, "engine": "e", "settings": "s", "prompt": "a cat", "label": None}


def test_a_parquet_file_has_the_columns_of_an_image_dataset(tmp_path):
    write_shard(tmp_path / "images.parquet", records(0, 2), "parquet")
    table = parquet.read_table(tmp_path / "images.parquet")
    assert table.column_names == ["index", "seed", "engine", "settings", "prompt", "label", "image"]
    assert table.column("image").to_pylist()[1] == {"bytes": b"png 1", "path": "000000001.png"}


def test_a_set_with_a_gap_is_refused(tmp_path):
    for start, stop in ((0, 4), (8, 12)):
        write_shard(tmp_path / ShardRange(start, stop).name("webdataset"), records(start, stop), "webdataset")
    assert list(shard_files(tmp_path)) == [ShardRange(0, 4), ShardRange(8, 12)]
    with pytest.raises(ArtifactError, match=r"lacks the images from 4 on, or has them twice\. Run edm-deploy generate again"):
        list(read_set(tmp_path))


@pytest.mark.parametrize("shard_format", shards.FORMATS)
def test_a_damaged_shard_has_a_fault_in_one_line(tmp_path, shard_format):
    path, whole = tmp_path / ShardRange(0, 4).name(shard_format), ShardRange(0, 4)
    write_shard(path, records(0, 4), shard_format)
    content = path.read_bytes()
    assert "other images than 4 to 7" in fault_of(path, ShardRange(4, 8), "s")
    assert "other settings" in fault_of(path, whole, "another")
    for damaged in (content[: len(content) // 2], b"", b"x" * 3000):
        path.write_bytes(damaged)
        assert str(path) in fault_of(path, whole, "s")
        assert "\n" not in fault_of(path, whole, "s")


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edm_deploy_tools.images.shards.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "images.tar", records(0, 1), "webdataset")
    assert list(tmp_path.iterdir()) == []


def test_files_of_interrupted_writes_are_removed_and_no_others(tmp_path):
    for name in (".images-000000000-000000004.tar.0123abcd.part", "images-000000000-000000004.tar", "notes.part"):
        (tmp_path / name).write_bytes(b"")
    assert shards.remove_parts(tmp_path) == [".images-000000000-000000004.tar.0123abcd.part"]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_image_without_its_own_json_is_refused(tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        entry = tarfile.TarInfo("000000003.png")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(ArtifactError, match=r"000000003\.png has no json of its own"):
        list(read_shard(tmp_path / "images.tar"))

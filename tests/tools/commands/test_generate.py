from __future__ import annotations

import json


def test_a_set_is_made_continued_and_reported(run, chain, tmp_path):
    options = ("--out", tmp_path / "out", "--steps", 1, "--num-images", 5, "--shard-images", 2, "--format", "parquet")
    ran = run("generate", chain.engine, *options)
    assert ran.code == 0, ran.err
    assert "5 images in 3 shards" in ran.out
    assert "generate 5/5" in ran.err
    min((tmp_path / "out").glob("*.parquet")).unlink()
    ran = run("generate", chain.engine, *options, "--json")
    assert {**json.loads(ran.out), "seconds": 0} == {"out": str(tmp_path / "out"), "images": 5, "made": 2, "shards": 3, "seconds": 0}


def test_a_request_without_a_number_and_prompts_is_refused(run, chain, tmp_path):
    assert "give --num-images N, or --prompts FILE" in run("generate", chain.engine, "--out", tmp_path / "out").complaint
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds other files" in run("generate", chain.engine, "--out", tmp_path / "out", "--num-images", 2).complaint
    assert "--batch 100 is outside" in run("generate", chain.engine, "--out", tmp_path / "o", "--num-images", 2, "--batch", 100).complaint

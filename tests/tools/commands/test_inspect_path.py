from __future__ import annotations


def test_inspect_names_the_kind_of_every_directory(run, chain):
    for path, kind in ((chain.model, "model"), (chain.artifact, "artifact"), (chain.onnx, "ONNX"), (chain.engine, "engine")):
        ran = run("inspect", path)
        assert ran.code == 0, ran.err
        assert kind in ran.out


def test_inspect_of_a_path_that_is_nothing_of_ours_is_refused(run, tmp_path):
    ran = run("inspect", tmp_path)
    assert ran.code == 2
    assert str(tmp_path.name) in ran.complaint

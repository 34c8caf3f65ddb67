from __future__ import annotations


def test_the_output_directory_is_printed(run, chain, tmp_path):
    ran = run("export", chain.artifact, "--out", tmp_path / "onnx")
    assert ran.code == 0
    assert f"Wrote {tmp_path / 'onnx'}" in ran.out


def test_plugin_nodes_for_a_backend_that_does_not_run_them_are_refused_before_the_export(run, chain, tmp_path):
    ran = run("export", chain.artifact, "--out", tmp_path / "onnx", "--int4", "plugin", "--for", "openvino")
    assert ran.code == 2
    assert "openvino does not run INT4 plugin nodes" in ran.complaint
    assert not (tmp_path / "onnx").exists()

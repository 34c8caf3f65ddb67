from edm_deploy_tools.convert_inception import main


def test_another_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "other.pth").write_bytes(b"no weights")
    assert main([str(tmp_path / "other.pth"), str(tmp_path / "out.safetensors")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "that of the published weights begins with 6726825d" in err
    assert not (tmp_path / "out.safetensors").exists()

from dataclasses import replace

import pytest

from edm_deploy import load_denoiser, load_pipeline
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.runtime.load import open_session, with_threads
from engines import build_engine

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def engine(onnx_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "ort"
    build_engine(onnx_w4a4, path, backend="ort")
    return path


def test_an_engine_opens_where_its_backend_runs_unless_a_device_is_named(engine):
    manifest, session = open_session(engine)
    assert (manifest.backend, session.device.type) == ("ort", "cpu")
    with pytest.raises(UnsupportedError, match="ort runs on cpu and cuda, not on meta"):
        open_session(engine, device="meta")


def test_a_directory_that_is_no_engine_is_refused(tmp_path, onnx_w4a4):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_denoiser(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="expected an engine directory"):
        load_denoiser(onnx_w4a4)


def test_an_unknown_scheduler_is_refused(engine):
    with pytest.raises(UnsupportedError, match="Did you mean 'euler'"):
        load_pipeline(engine, scheduler="eular")


def test_an_engine_is_opened_with_the_threads_that_are_asked_for(engine):
    assert load_denoiser(engine).manifest.build["options"]["threads"] is None
    opened = load_denoiser(engine, threads=1)
    assert opened.manifest.build["options"]["threads"] == 1
    assert opened.session._session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(InputError, match=r"0 threads: expected 1 or more"):
        load_denoiser(engine, threads=0)


def test_a_backend_without_the_option_keeps_its_manifest(engine):
    manifest, session = open_session(engine)
    session.close()
    without = replace(manifest, build={**manifest.build, "options": {}})
    assert with_threads(without, 4) is without
    assert with_threads(manifest, None) is manifest

from __future__ import annotations

import json

import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy_tools.inspection.describe import describe, kind_of
from edm_deploy_tools.inspection.describe_model import is_architecture, pipeline_config_of, work_of


@pytest.fixture(scope="module")
def sd15():
    return describe("sd15")


def test_an_architecture_is_described_by_its_name(sd15):
    assert kind_of("sd15") == "model"
    assert sd15.facts["parameters"] == "859,520,964"
    assert sd15.facts["sites"].startswith("282: 261 quantized, 21 kept at W8A8")
    assert sd15.facts["sample"] == "4x64x64"


def test_the_memory_of_calibration_is_said_beforehand(sd15):
    assert sd15.facts["calibration needs"].startswith("3.4 GB for float32 weights")


def test_work_and_sizes_are_those_of_stable_diffusion(sd15):
    """The sites' share of the work is known: 339 G of about 402 G multiply-accumulates, the rest attention's own matmuls."""
    assert sd15.facts["MACs a sample"].startswith("338.6")
    w4 = next(row for row in sd15.tables["Expected artifact (100 rows)"] if row["scheme"] == "W4A4")
    assert w4["of float16"] <= 0.30
    assert sum(row["MACs %"] for row in sd15.tables["Shares"]) == pytest.approx(100, abs=0.05)


def test_what_is_kept_has_its_reason(sd15):
    assert sum(row["layers"] for row in sd15.tables["Kept"]) == 21
    assert all(row["kept"] == "W8A8" and row["because"] for row in sd15.tables["Kept"])


def test_each_backend_has_a_plan_for_each_scheme(sd15):
    rows = {(row["scheme"], row["backend"]): row["plan"] for row in sd15.tables["Expected engine"]}
    assert rows["W4A4", "cuda"] == "261 sites stored W4A4, executed as INT4; 21 sites stored W8A8, executed as INT8"
    assert "282 sites stored W8A8, executed as INT8" in rows["W8A8", "trt-rtx"]


def test_everything_reads_as_json(sd15):
    assert json.loads(json.dumps(dict(sd15.tables)))["Sites"][0]["site"] == "conv_in"


def test_a_model_is_described_though_its_weights_are_gone(copy_of, tiny_model_dir):
    path = copy_of(tiny_model_dir)
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert describe(str(path)).facts["scheduler"] == "DDIMScheduler, 1000 timesteps, predicts epsilon"


def test_a_directory_goes_before_an_architecture_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_architecture("sd15")
    (tmp_path / "sd15").mkdir()
    assert not is_architecture("sd15")


def test_work_follows_the_sites_of_the_family(tiny_model_dir):
    pipeline = pipeline_config_of(str(tiny_model_dir))
    assert set(work_of(pipeline).sites) == {row["site"] for row in describe(str(tiny_model_dir)).tables["Sites"]}


def test_an_architecture_without_a_family_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setattr("edm_deploy.models.unet2d_condition.FAMILY.class_name", "Another", raising=False)
    with pytest.raises(UnsupportedError, match="No model family supports 'UNet2DConditionModel'"):
        describe("sd15")


@pytest.mark.parametrize(("name", "meant"), [("SD15", "sd15"), ("sdxll", "sdxl")])
def test_an_architecture_written_in_another_way_is_suggested(run, name, meant):
    complaint = run("inspect", name).complaint
    assert (
        f"{name} does not exist; expected a directory, a hub id such as google/ddpm-cifar10-32, or an architecture. Did you mean '{meant}'?"
        in complaint
    )
    assert "flux1-schnell" in complaint

from __future__ import annotations

import pytest
import torch

import engines
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import CAPABILITIES, plan_layers
from edm_deploy.runtime.manifest import ShapeRange
from engines.performance.gpus import gpu_named
from engines.performance.int4_selection import int4_where_faster, select_int4
from tests.conftest import artifact_by_hand, tiny_inputs


@pytest.fixture(scope="module")
def artifact():
    return artifact_by_hand()


@pytest.fixture(scope="module")
def plans(artifact):
    return plan_layers(artifact, CAPABILITIES["cuda"])


def test_only_sites_of_4_bits_are_moved_and_each_is_named(artifact, plans):
    choice = int4_where_faster(plans, artifact, gpu_named("rtx3090"), 1)
    assert choice.as_int8  # a model of 16 channels gives 4 bits little to do
    for name, before in plans.items():
        after = choice.plans[name]
        assert (after.executed, after.codes) == (("int8", "s8") if name in choice.as_int8 else (before.executed, before.codes))
        assert after.stored == before.stored
    assert all(plans[name].executed == "int4" for name in choice.as_int8)


def test_the_reason_names_the_gpu_the_batch_and_how_many(artifact, plans):
    choice = int4_where_faster(plans, artifact, gpu_named("rtx3090"), 1)
    narrow = sum(before.executed == "int4" for before in plans.values())
    assert choice.reasons[0].startswith(
        f"{len(choice.as_int8)} of {narrow} sites whose codes fit 4 bits run as INT8: on GeForce RTX 3090 at batch 1"
    )


def test_without_int4_tensor_cores_every_site_is_moved(artifact, plans):
    choice = int4_where_faster(plans, artifact, gpu_named("h200"), 1)
    assert "int4" not in {after.executed for after in choice.plans.values()}


def test_nothing_is_moved_without_a_reason():
    wide = artifact_by_hand(weight_bits=8, act_bits=8)
    plans = plan_layers(wide, CAPABILITIES["cuda"])
    choice = int4_where_faster(plans, wide, gpu_named("rtx3090"), 1)
    assert (dict(choice.plans), choice.as_int8, choice.reasons) == (plans, frozenset(), ())


@pytest.mark.parametrize("requested", [None, "fits"])
def test_by_default_every_site_keeps_its_plan(artifact, plans, requested):
    assert select_int4(plans, artifact, BuildOptions(int4_where=requested)).plans is plans


def test_the_gpu_and_the_usual_batch_are_those_of_the_build(artifact, plans):
    options = BuildOptions(int4_where="faster", gpu="RTX 4090", profile={"batch": ShapeRange(1, 7, 64)})
    assert select_int4(plans, artifact, options) == int4_where_faster(plans, artifact, gpu_named("rtx4090"), 7)


def test_without_a_gpu_one_must_be_named(artifact, plans, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--int4-where faster needs to know the GPU.*rtx3090"):
        select_int4(plans, artifact, BuildOptions(int4_where="faster", profile={"batch": ShapeRange(1, 7, 64)}))


def test_a_gpu_whose_figures_are_not_known_is_refused(artifact, plans):
    with pytest.raises(UnsupportedError, match="figures of GPU 'sm_86' are not known"):
        select_int4(plans, artifact, BuildOptions(int4_where="faster", gpu="sm_86", profile={"batch": ShapeRange(1, 7, 64)}))


def test_an_engine_with_sites_moved_to_int8_reports_them_and_computes_the_same_codes(artifact, tmp_path):
    from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs

    artifact.save(tmp_path / "artifact")
    options = BuildOptions(int4_where="faster", gpu="rtx3090", profile={"batch": ShapeRange(1, 1, 4)})
    engine = engines.build_engine(tmp_path / "artifact", tmp_path / "engine", backend="cuda", options=options)
    moved = engine.build["int4_run_as_int8"]
    assert moved
    assert any("--int4-where faster" in warning for warning in engine.build["warnings"])
    assert {(engine.plan[name].executed, engine.plan[name].codes) for name in moved} == {("int8", "s8")}
    dtype = engines.backend_named("cuda").site_dtype(engine)
    sites = agreement(cut_from_inputs(artifact, tiny_inputs("unet2d", batch=4), tmp_path / "cut", dtype=dtype), engine, device="cpu")
    assert [site.site for site in sites if site.ties or site.differ] == []
    assert {site.site for site in sites} == set(artifact.sites)


def test_a_backend_that_has_no_int4_refuses_the_option(onnx_w4a4, tmp_path):
    with pytest.raises(UnsupportedError, match="ort has no option --int4-where"):
        engines.build_engine(onnx_w4a4, tmp_path / "engine", backend="ort", options=BuildOptions(int4_where="faster"))

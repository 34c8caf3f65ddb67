"""The table of what depends on the timestep alone: each row beside the layers that it replaces, then whole graphs."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import ArtifactError
from edm_deploy.export import time_table
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.models import family_named
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import Manifest
from engines import build_engine
from engines.ort import BACKEND as ORT
from tests.conftest import TINY, artifact_by_hand, check_no_further, tiny_inputs, tiny_model
from tests.this_cpu import openvino_executes


def folded_by_hand(kind="unet2d"):
    """`artifact_by_hand`, its time-only layers in floating point."""
    artifact = artifact_by_hand(kind)
    family, config, model = tiny_model(kind)
    names = family.time_layers(model, config)
    sites = {name: site for name, site in artifact.sites.items() if name not in names}
    params = {key: value.clone() for key, value in model.state_dict().items() if key.removesuffix(".weight") not in sites}
    return replace(artifact, sites=sites, params=params, folded=names)


@pytest.fixture(scope="module")
def folded():
    return folded_by_hand()


@pytest.fixture(scope="module")
def exported(folded, tmp_path_factory):
    out = tmp_path_factory.mktemp("fold") / "onnx"
    return out, onnx_from_artifact(folded, out), onnx.load(out / "model.onnx")


@pytest.fixture(scope="module")
def session(exported, tmp_path_factory):
    engine = tmp_path_factory.mktemp("fold") / "engine"
    manifest = build_engine(exported[0], engine, backend="ort")
    return ORT.open(engine, manifest, torch.device("cpu"))


@pytest.mark.parametrize("kind", [kind for kind in TINY if family_named(TINY[kind][0]).time_only(TINY[kind][1])])
def test_time_only_layers_depend_on_the_timestep_alone(kind):
    family, config, model = tiny_model(kind)
    seen = [{}, {}, {}]
    names = family.time_layers(model, config)
    assert names
    inputs = tiny_inputs(kind)
    others = tiny_inputs(kind, seed=1)  # another sample and other conditioning at the same timesteps
    later = inputs | {"timestep": inputs["timestep"] - 1}
    for record, given in zip(seen, (inputs, others, later), strict=True):
        handles = [
            layer.register_forward_hook(lambda _, args, y, name=name, record=record: record.__setitem__(name, y))
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        family.forward(model, given)
        for handle in handles:
            handle.remove()
    for name in names:
        assert torch.equal(seen[0][name], seen[1][name])
        assert not torch.equal(seen[0][name], seen[2][name])


def test_only_without_other_conditioning_do_projections_see_the_timestep_alone():
    for kind, alone in (("unet2d", True), ("unet2d-condition", True), ("unet2d-classes", False)):
        family, config, model = tiny_model(kind)
        projections = [name for name in family.time_layers(model, config) if name.endswith("time_emb_proj")]
        assert bool(projections) == alone


def test_every_row_of_the_table_is_what_the_layers_compute_at_its_timestep(exported):
    *_, model = exported
    (table,) = (onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name == "time.features")
    family, _, float_model = tiny_model("unet2d")
    seen = []
    handles = [
        layer.register_forward_hook(lambda _, args, y: seen.append(y))
        for name, layer in float_model.named_modules()
        if name.endswith("time_emb_proj")
    ]
    family.forward(float_model, {"sample": torch.zeros(1000, 3, 4, 4), "timestep": torch.arange(1000).float()})
    for handle in handles:
        handle.remove()
    # numpy's and torch's sine, exponential and sums, each to float32's rounding.
    np.testing.assert_allclose(table, torch.cat(seen, dim=1).numpy(), rtol=1e-4, atol=2e-6)


def test_the_layers_are_gone_from_the_graph(folded, exported):
    _, manifest, model = exported
    names = {each.name for each in model.graph.initializer}
    assert not [name for name in names if "time_emb" in name]
    assert not [node.op_type for node in model.graph.node if node.op_type in ("Sin", "Cos", "Gemm")]
    assert manifest.folded["layers"] == list(folded.folded)
    assert manifest.folded["table"] == "1000 timesteps x 104 features, 0.4 MiB"
    assert set(manifest.sites) == set(folded.sites)


def test_the_manifest_keeps_it(exported):
    assert Manifest.read(exported[0], kind="onnx").folded == exported[1].folded


def test_at_whole_timesteps_the_engine_is_as_near_the_reference_as_it_would_be_computed(folded, session):
    inputs = tiny_inputs("unet2d", batch=4)
    expected = Reference(folded)(inputs)
    got = session.run(inputs)["prediction"]
    float_model = tiny_model("unet2d")[2]
    truth = float_model(inputs["sample"], inputs["timestep"]).sample
    check_no_further(got, expected, truth)  # a last bit of the time features may flip a code


def test_between_two_timesteps_features_are_interpolated_linearly(exported):
    from onnx.reference import ReferenceEvaluator

    *_, model = exported
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    kept = [node for node in opened.graph.node if node.name.startswith("time/")]
    del opened.graph.node[:], opened.graph.output[:]
    opened.graph.node.extend(kept)
    opened.graph.output.append(onnx.ValueInfoProto(name="time/features"))
    (table,) = (onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name == "time.features")
    t = np.array([0, 1, 998.25, 999, 1200, -3, 500.5], dtype=np.float32)
    (got,) = ReferenceEvaluator(opened).run(None, {"timestep": t, "sample": np.zeros((7, 3, 8, 8), np.float32)})
    assert np.array_equal(got[[0, 1, 3, 4, 5]], table[[0, 1, 999, 999, 0]])
    np.testing.assert_allclose(got[2], 0.75 * table[998] + 0.25 * table[999], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got[6], 0.5 * (table[500] + table[501]), rtol=1e-5, atol=1e-7)


def test_a_table_larger_than_the_limit_is_not_made_and_the_manifest_says_so(folded, tmp_path, monkeypatch):
    monkeypatch.setattr(time_table, "LARGEST_TABLE", 1000)
    manifest = onnx_from_artifact(folded, tmp_path / "onnx")
    assert manifest.folded["computed"].startswith("a table of 1000 timesteps x 104 features would be larger")
    assert "table" not in manifest.folded
    assert any(
        node.op_type in ("Gemm", "MatMul") and "time_emb" in str(node.input) for node in onnx.load(tmp_path / "onnx/model.onnx").graph.node
    )


def test_an_artifact_that_folds_nothing_has_no_table(tmp_path):
    manifest = onnx_from_artifact(artifact_by_hand(), tmp_path / "onnx")
    assert manifest.folded == {}


@pytest.mark.parametrize("backend", ["openvino", pytest.param("trt-rtx", marks=pytest.mark.extended)])
def test_other_engines_take_the_folded_graph(folded, tmp_path, backend):
    onnx_from_artifact(folded, tmp_path / "onnx", dtype="fp16" if backend == "trt-rtx" else "fp32")
    manifest = build_engine(tmp_path / "onnx", tmp_path / "engine", backend=backend)
    assert {plan.executed for plan in manifest.plan.values()} == {openvino_executes() if backend == "openvino" else "int8"}
    if backend == "openvino":
        from engines.openvino import BACKEND

        inputs = tiny_inputs("unet2d", batch=4)
        got = BACKEND.open(tmp_path / "engine", manifest, torch.device("cpu")).run(inputs)["prediction"]
        expected = Reference(folded)(inputs)
        truth = tiny_model("unet2d")[2](inputs["sample"], inputs["timestep"]).sample
        assert (got.float() - expected).pow(2).mean() < (expected - truth).pow(2).mean()


def test_folding_is_kept_by_the_artifact_and_decides_its_digest(folded, tmp_path):
    loaded = Artifact.load(folded.save(tmp_path / "artifact"))
    assert loaded.folded == folded.folded
    assert loaded.digest == folded.digest != replace(folded, folded=()).digest


def test_an_artifact_of_schema_1_still_loads(tmp_path):
    artifact = artifact_by_hand()
    artifact.save(tmp_path / "artifact")
    path = tmp_path / "artifact" / "artifact.json"
    description = json.loads(path.read_text())
    assert "folded" not in description
    path.write_text(json.dumps(description | {"schema": 1}))
    loaded = Artifact.load(tmp_path / "artifact")
    assert loaded.folded == ()
    assert loaded.digest == artifact.digest


def test_an_artifact_that_folds_a_site_is_refused(folded):
    with pytest.raises(ArtifactError, match="folds 'conv_in', which is a quantized site"):
        replace(folded, folded=("conv_in",)).validate()
    with pytest.raises(ArtifactError, match="folds 'nothing', which is no layer"):
        replace(folded, folded=("nothing",)).validate()


@pytest.fixture(scope="module")
def folded_pixart(tmp_path_factory):
    """An artifact in whose blocks one layer's output meets a table of each block: the time table ends in front of those."""
    folder = tmp_path_factory.mktemp("pixart")
    artifact = folded_by_hand("pixart")
    artifact.save(folder / "artifact")
    return artifact, folder, onnx_from_artifact(artifact, folder / "onnx")


def test_an_adaln_single_is_a_table_as_wide_as_what_its_layers_give(folded_pixart):
    artifact, _, manifest = folded_pixart
    assert artifact.folded == (
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        "adaln_single.linear",
    )
    # 16 for the last norm, 6 x 16 for all blocks together; with the tables of both blocks added it would be 16 x 16.
    assert manifest.folded["table"].startswith("1000 timesteps x 112 features")


@pytest.mark.parametrize("backend", ["ort", "cuda"])
def test_an_engine_of_a_folded_artifact_is_the_reference(folded_pixart, backend):
    """At whole timesteps the table holds what the layers give; cuda keeps the layers, in float16."""
    artifact, folder, _ = folded_pixart
    build_engine(folder / ("artifact" if backend == "cuda" else "onnx"), folder / backend, backend=backend)
    assert not set(artifact.folded) & set(Manifest.read(folder / backend, kind="engine").plan)
    family, _, model = tiny_model("pixart")
    inputs = tiny_inputs("pixart")
    exact, expected = family.forward(model, inputs), Reference(artifact)(inputs)
    found = load_denoiser(folder / backend, device="cpu").run(inputs)
    if backend == "ort":
        assert (found - expected).norm() <= (expected - exact).norm()
    assert (found - exact).norm() <= 2 * (expected - exact).norm()

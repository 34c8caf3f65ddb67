"""What holds for every backend on a network with segments, float branches, pre-scales, rotations and bits by channel: the reference's codes at every site."""

from dataclasses import dataclass, replace

import onnx
import pytest
import torch

import calibration
import engines
from calibration.recipes.minmax import MinMax
from calibration.run.options import RunOptions
from calibration.training.trainable_weights import detach_weight
from edm_deploy import Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.restructure import PRE_SCALE, NetworkRewrite, rotated_weight
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import CAPABILITIES, plan_layers
from edm_deploy.runtime.load import open_session
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs
from tests.calibration.tiny import tiny_source
from tests.conftest import check_no_further, tiny_inputs
from tests.contracts.test_backends import RUNS_HERE, engine_of

SHORTCUT = "up_blocks.0.resnets.0.conv_shortcut"
QUERY, CONV = "up_blocks.0.attentions.0.to_q", "down_blocks.1.resnets.0.conv2"
BRANCHES = {QUERY: 2, CONV: 3, f"{SHORTCUT}.segment0": 2, "down_blocks.0.downsamplers.0.conv": 1}
SCALED = (f"{QUERY}.base", f"{CONV}.base", f"{SHORTCUT}.segment1")
MIXED = "down_blocks.0.resnets.0.conv1"


@dataclass(frozen=True, kw_only=True)
class Restructuring(MinMax):
    """One of each thing that a recipe can change about the network, at random."""

    rotate: str = "all"

    def structure(self, source):
        channels = source.model.get_submodule(SHORTCUT).in_channels
        return NetworkRewrite({SHORTCUT: (channels - 8, 8)}, branches=BRANCHES)

    def fit(self, context):
        student = context.student
        generator = torch.Generator().manual_seed(1)
        for name in BRANCHES:
            layer, branch = student.layers[f"{name}.base"], student.branches[name]
            down, up = (0.3 * torch.randn(part.weight.shape, generator=generator) for part in (branch.down, branch.up))
            branch.set_weights(down, up)
            detach_weight(layer).sub_(rotated_weight(layer.layer, branch.product().reshape(layer.layer.weight.shape)))
            layer.set_weight_scale(self.weight_scale(layer.merged_weight(), layer.bits))
        for name in SCALED:
            student.set_pre_scale(name, 0.5 + torch.rand(student.layers[name].layer.weight.shape[1], generator=generator))
            for sibling in student.shared_input_layers(name):
                layer = student.layers[sibling]
                layer.set_weight_scale(self.weight_scale(layer.merged_weight(), layer.bits))
        layer = student.layers[MIXED]
        offsets = torch.tensor([-1, 0, 1, 0] * (len(layer.log_weight_scale) // 4)).clamp(max=8 - layer.bits)
        layer.set_weight_scale(self.weight_scale(layer.merged_weight(), layer.bits) * 2.0**-offsets)
        layer.set_channel_bits(layer.bits + offsets)
        super().fit(context)


def restructured(bits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "fold_pre_scales", lambda artifact: artifact)  # so that backends meet the Mul of q, k and v
        recipe = Restructuring(rows=3, calibration_samples=2, weight_bits=bits, act_bits=bits)
        return calibration.fit(tiny_source(), recipe, RunOptions())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return Artifact.load(restructured(4).save(tmp_path_factory.mktemp("structured") / "a"))


def test_an_artifact_keeps_its_structure(artifact):
    parts = [f"{SHORTCUT}.segment0.base", f"{SHORTCUT}.segment1"]
    assert artifact.structure.branches == BRANCHES and not any("branch" in name for name in artifact.sites)
    assert set(parts) <= set(artifact.sites) and SHORTCUT not in artifact.sites
    assert artifact.structure.segments.keys() == {SHORTCUT}
    assert set(SCALED) <= set(artifact.structure.pre_scaled), "q, k and v share theirs"
    assert set(artifact.structure.rotated.values()) == {16} and SCALED[0] in artifact.structure.rotated
    assert artifact.provenance["rotations"] == "16 of 16, 0 of them folded"
    assert sorted(set(artifact.sites[MIXED].channel_bits.tolist())) == [3, 4, 5]
    assert artifact.sites[MIXED].scheme == "W4A4" and not torch.equal(*(artifact.sites[part].activation.scale for part in parts))


def test_without_rounding_the_function_is_the_published_one():
    source = tiny_source()
    fine = calibration.fit(source, Restructuring(rows=3, calibration_samples=2, weight_bits=8, act_bits=16), RunOptions())
    assert fine.provenance["folded_pre_scales"] == "3 of 5", "q, k and v's into the norm in front of them"
    assert not any(".to_" in name for name in fine.structure.pre_scaled)
    inputs = tiny_inputs("unet2d")
    expected = source.family_object.forward(source.model, inputs)
    found = Reference(fine)(inputs)
    assert float((found - expected).square().mean() / expected.square().mean()) < 1e-3  # 7 and 8 bits of weight


@pytest.mark.parametrize("name", RUNS_HERE)
def test_at_every_site_the_codes_are_those_of_the_reference(name, artifact, tmp_path):
    backend = engines.backend_named(name)
    engine = engine_of(artifact, backend, tmp_path)
    cut = cut_from_inputs(artifact, tiny_inputs("unet2d", batch=4), tmp_path / "cut", dtype=backend.site_dtype(engine))
    sites = agreement(cut, engine, device="cpu")
    assert {site.site for site in sites} == set(artifact.sites)
    assert [site.site for site in sites if site.ties or site.differ] == []


@pytest.fixture(scope="module")
def graph(artifact, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "onnx"
    onnx_from_artifact(artifact, path)
    return path


def test_the_graph_splits_scales_and_adds(artifact, graph):
    model = onnx.load(graph / "model.onnx")
    producers = {output: node for node in model.graph.node for output in node.output}
    inputs = {node.name: node.input[0] for node in model.graph.node}

    def before(site, op):
        name = inputs[f"{site}/sum"]
        while (node := producers[name]).op_type != op:
            name = node.input[0]
        return node

    halves = [before(f"{SHORTCUT}.{part}", "Split") for part in ("segment0.base", "segment1")]
    assert halves[0].name == halves[1].name
    for op in ("QuantizeLinear", "MatMul"):
        shared = {before(QUERY.replace("to_q", part), op).name for part in ("to_q.base", "to_k", "to_v")}
        assert len(shared) == 1, "siblings that are scaled and rotated alike share one rotation and one quantizer"
    rotations = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1].endswith("lifted_tensor_0")]
    assert len(rotations) == 8, "one for q, k and v and one for the output of each of four attentions"


def relative(found, expected):
    return float((found - expected).square().mean() / expected.square().mean())


def test_a_whole_engine_computes_what_the_reference_does(artifact, graph, tmp_path):
    engines.build_engine(graph, tmp_path / "engine", backend="ort")
    _, session = open_session(tmp_path / "engine")
    inputs = tiny_inputs("unet2d")
    source = tiny_source()
    exact = source.family_object.forward(source.model, inputs)
    check_no_further(session.run(inputs)["prediction"], Reference(artifact)(inputs), exact)


def test_fusing_norms_and_activations_into_quantizers_leaves_pre_scales_where_they_are(tmp_path):
    artifact = restructured(8)
    engines.build_engine(artifact.save(tmp_path / "a"), tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="sm_86"))
    _, session = open_session(tmp_path / "engine", device="cpu")
    inputs = tiny_inputs("unet2d")
    expected = Reference(artifact)(inputs)
    lost = {name: torch.ones_like(value) if name.endswith(PRE_SCALE) else value for name, value in artifact.params.items()}
    without = relative(Reference(replace(artifact, params=lost))(inputs), expected)
    # Float16 between the sites flips codes; losing the pre-scales is another matter.
    assert relative(session.run(inputs)["prediction"], expected) < without / 4


@pytest.mark.extended  # every site of a network without rewrites in test_family_engines.py
def test_tensorrt_rtx_puts_every_part_in_an_integer_layer(artifact, graph, tmp_path):
    manifest = engines.build_engine(graph, tmp_path / "engine", backend="trt-rtx", options=BuildOptions(gpu="sm_86"))
    assert {plan.executed for plan in manifest.plan.values()} == {"int8"}


def test_bits_by_channel_need_int8_kernels_where_one_has_more_than_4(artifact):
    plans = plan_layers(artifact, CAPABILITIES["cuda"])
    assert plans[MIXED].codes == "s8"
    assert {plans[f"{name}.base"].executed for name in (QUERY, CONV)} == {"int4"}

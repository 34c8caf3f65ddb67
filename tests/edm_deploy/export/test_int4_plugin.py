"""The graph with plugin nodes, run by onnx's own evaluator with the two plugins written in numpy and torch: every site beside the reference."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.export.int4_plugin import plugin_kinds
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.export.plugin_schema import CONV, NAMESPACE, QUANTIZE
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.kernel_layout import unpack_codes
from edm_deploy.runtime.manifest import Manifest
from tests.conftest import artifact_by_hand, tiny_inputs


class EdmQuantize(OpRun):
    op_domain = NAMESPACE

    def _run(self, x, row, inv_scale, qmin, qmax, bits=None, unsigned_codes=None, channels_last=None, **_):
        assert x.dtype == np.float16
        pixels = x if channels_last else x.transpose(0, 2, 3, 1)
        low, high, scale = (column[row].reshape(-1, 1, 1, 1) for column in (qmin, qmax, inv_scale))
        codes = np.clip(np.rint(pixels.astype(np.float32) * scale), low, high).astype(np.int32) - low * unsigned_codes
        n, h, w, c = codes.shape
        nibbles = np.zeros((n, h, w, -(-c // 32) * 32), dtype=np.int32)
        nibbles[..., :c] = codes & 15
        return ((nibbles[..., 0::2] | nibbles[..., 1::2] << 4).astype(np.uint8).view(np.int8),)


class EdmConv(OpRun):
    op_domain = NAMESPACE

    def _run(
        self, codes, weight, zero, row, act_scale, qmin, weight_scale, weight_sum, bias, unsigned_codes=None, kernel=None, **attributes
    ):
        padding, stride = attributes["padding"], attributes["stride"]
        unsigned = bool(unsigned_codes)
        x = unpack_codes(torch.from_numpy(codes.copy()).view(torch.uint8), 4, unsigned=unsigned).double().permute(0, 3, 1, 2)
        taps = unpack_codes(torch.from_numpy(weight.copy()).view(torch.uint8), 4).double()
        around = unpack_codes(torch.from_numpy(zero.copy()).view(torch.uint8), 4, unsigned=unsigned).double()[
            torch.from_numpy(row).long(), 0
        ]
        padded = around.reshape(-1, 1, 1, 1).expand(x.shape[0], x.shape[1], x.shape[2] + 2 * padding, x.shape[3] + 2 * padding).clone()
        padded[:, :, padding : padding + x.shape[2], padding : padding + x.shape[3]] = x
        filters = taps.unflatten(1, (kernel, kernel)).permute(0, 3, 1, 2)
        total = torch.nn.functional.conv2d(padded, filters, stride=stride).permute(0, 2, 3, 1).numpy()
        if unsigned:
            total = total + qmin[row].reshape(-1, 1, 1, 1) * weight_sum
        y = total.astype(np.float32) * (act_scale[row].reshape(-1, 1, 1, 1) * weight_scale) + bias
        return (y.astype(np.float16),)


class GroupNormalization(OpRun):
    """The evaluator's own cannot run the standard's function of opset 21."""

    op_domain = ""

    def _run(self, x, scale, bias, epsilon=None, num_groups=None, stash_type=None):
        x, scale, bias = (torch.from_numpy(value.copy()) for value in (x, scale, bias))
        return (torch.nn.functional.group_norm(x.float(), num_groups, scale.float(), bias.float(), epsilon).to(x.dtype).numpy(),)


def with_some_signed(artifact):
    """The same artifact with the 4-bit ranges of every second convolution symmetric: they are of kind s4 then, the others of kind u4."""
    second = [name for name, site in artifact.sites.items() if site.weight_bits == 4 and site.op == "conv2d"][::2]

    def flat(table):
        return ActivationTable(
            bits=table.bits, scale=table.scale, qmin=torch.full_like(table.qmin, -7), qmax=torch.full_like(table.qmax, 7)
        )

    sites = {name: replace(site, activation=flat(site.activation)) if name in second else site for name, site in artifact.sites.items()}
    return replace(artifact, sites=sites)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    artifact = with_some_signed(artifact_by_hand("unet2d-condition"))
    out = tmp_path_factory.mktemp("plugin") / "onnx"
    manifest = onnx_from_artifact(artifact, out, dtype="fp16", int4="plugin")
    return artifact, manifest, onnx.load(out / "model.onnx"), out


def plugin_nodes(model, plugin):
    return [node for node in model.graph.node if node.op_type == plugin.name]


def test_each_site_computes_what_the_reference_does_from_the_same_input(exported):
    artifact, manifest, model, _ = exported
    sites = list(manifest.plugin_sites)
    nodes = {node.output[0]: node for node in model.graph.node}
    ends = {name: manifest.sites[name].node for name in sites}
    starts = {name: nodes[nodes[end].input[0]].input[0] for name, end in ends.items()}
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    names = sorted(set(ends.values()) | set(starts.values()))
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    inputs = {"sample": torch.float16, "encoder_hidden_states": torch.float16, "timestep": torch.float32}
    feed = {name: value.to(inputs[name]) for name, value in tiny_inputs("unet2d-condition").items()}
    _, *values = ReferenceEvaluator(opened, new_ops=[EdmQuantize, EdmConv, GroupNormalization]).run(
        None, {name: value.numpy() for name, value in feed.items()}
    )
    seen = dict(zip(names, map(torch.from_numpy, values), strict=True))

    def as_in_the_model(name, value):
        if artifact.sites[name].op == "conv2d":
            return value
        return value.float().reshape(value.shape[0], -1, value.shape[-1])

    given = {name: as_in_the_model(name, seen[starts[name]]).float() for name in sites}
    records = Reference(artifact).at_sites(given, feed["timestep"])
    for name in sites:
        y = seen[ends[name]].float()
        y = y.permute(0, 3, 1, 2) if artifact.sites[name].op == "conv2d" else as_in_the_model(name, y)
        # One rounding to float16 on our side, none on the reference's: half a unit in the last place, 2^-11, or the subnormals' 2^-25.
        torch.testing.assert_close(y, records[name].y, rtol=2**-11 + 1e-6, atol=2**-24, msg=lambda said, name=name: f"{name}: {said}")


def test_four_bit_sites_are_plugin_nodes_and_eight_bit_sites_stay_qdq(exported):
    artifact, manifest, model, _ = exported
    four = {name for name, site in artifact.sites.items() if site.weight_bits == 4}
    assert set(manifest.plugin_sites) == four
    assert manifest.plugin_sites == {name: "s4" if int(artifact.sites[name].activation.qmin.min()) == -7 else "u4" for name in four}
    assert set(manifest.plugin_sites.values()) == {"s4", "u4"}
    assert {node.name for node in plugin_nodes(model, CONV)} == {manifest.sites[name].node for name in four}
    ops = Counter(node.op_type for node in model.graph.node)
    # Activation and weight of each site that is left; the time embedding's two linears and the first and last convolution.
    assert ops["QuantizeLinear"] == len(artifact.sites) - len(four) > 0


def test_tensorrts_parser_finds_all_that_it_looks_for_on_a_node(exported):
    *_, model, _ = exported
    for plugin in (QUANTIZE, CONV):
        for node in plugin_nodes(model, plugin):
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            assert [attributes.pop(name) for name in ("plugin_namespace", "plugin_version", "aot")] == [b"edm_deploy", b"1", 1]
            assert set(attributes) == set(plugin.attributes)
            assert len(node.input) == len(plugin.inputs)


def test_no_plugin_has_the_name_of_a_standard_operator():
    """The parser looks importers up by op type and ignores the domain."""
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert not {QUANTIZE.name, CONV.name} & standard


def test_queries_keys_and_values_share_their_packed_codes(exported):
    *_, manifest, model, _ = exported
    nodes = {node.name: node for node in model.graph.node}
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert len({nodes[manifest.sites[f"{attention}.{leaf}"].node].input[0] for leaf in ("to_q", "to_k", "to_v")}) == 1


def test_the_manifest_keeps_which_sites_are_plugins(exported):
    _, manifest, _, out = exported
    assert Manifest.read(out, kind="onnx").plugin_sites == manifest.plugin_sites != {}


def test_float32_graphs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--int4 plugin: the plugins compute in float16, and the graph is fp32\. Add --dtype fp16"):
        onnx_from_artifact(artifact_by_hand(), tmp_path / "onnx", int4="plugin")


def test_packed_storage_with_plugins_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"plugin nodes always store packed weights\. Leave --weight-storage out"):
        onnx_from_artifact(artifact_by_hand(), tmp_path / "onnx", dtype="fp16", weight_storage="int4", int4="plugin")


def test_an_artifact_without_four_bit_sites_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"None of the \d+ sites of this W8A8 artifact has codes that fit 4 bits"):
        onnx_from_artifact(artifact_by_hand(weight_bits=8, act_bits=8), tmp_path / "onnx", dtype="fp16", int4="plugin")


def test_a_weight_only_site_has_no_plugin_nodes():
    artifact = artifact_by_hand()
    name = next(name for name, site in artifact.sites.items() if site.weight_bits == 4)
    weight_only = replace(artifact, sites=artifact.sites | {name: replace(artifact.sites[name], activation=None)})
    assert set(plugin_kinds(artifact)) - set(plugin_kinds(weight_only)) == {name}

"""The form of the graph; what it computes is judged in test_onnx.py and test_cut.py."""

from collections import Counter
from dataclasses import replace

import onnx_ir as ir
import pytest
import torch

from edm_deploy.export.onnx import graph_from_artifact
from edm_deploy.numerics.activation_table import ActivationTable
from tests.conftest import artifact_by_hand


def constant_tables(artifact):
    """The same artifact with row 0 of every table everywhere."""

    def flat(table):
        return ActivationTable(
            bits=table.bits,
            scale=table.scale[:1].expand(5).contiguous(),
            qmin=table.qmin[:1].expand(5).contiguous(),
            qmax=table.qmax[:1].expand(5).contiguous(),
        )

    sites = {name: replace(site, activation=flat(site.activation)) for name, site in artifact.sites.items()}
    return replace(artifact, sites=sites)


@pytest.fixture(scope="module")
def tables():
    return graph_from_artifact(artifact_by_hand(), torch.float16, "int4")


def ops(model):
    return Counter(node.op_type for node in model.graph)


def test_every_site_has_its_named_layer(tables):
    model, site_nodes = tables
    names = {node.name: node.op_type for node in model.graph}
    assert {names[node] for node in site_nodes.values()} == {"Conv", "MatMul"}


def test_quantize_and_dequantize_scales_are_the_constant_one(tables):
    model, _ = tables
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = (value.const_value.numpy() for value in node.inputs[1:3])
            assert (scale, zero) == (1.0, 0)


def test_the_island_is_float32_in_a_float16_graph(tables):
    model, _ = tables
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].dtype == ir.DataType.FLOAT


def test_queries_keys_and_values_share_one_quantized_input(tables):
    model, site_nodes = tables
    nodes = {node.name: node for node in model.graph}
    attention = "mid_block.attentions.0"
    shared = {nodes[site_nodes[f"{attention}.{leaf}"]].inputs[0] for leaf in ("to_q", "to_k", "to_v")}
    # By hand each of the three has the same table, because each sees the same input.
    assert len(shared) == 1


def test_four_bit_weights_are_packed_int4_initialisers(tables):
    model, _ = tables
    types = Counter(str(value.dtype) for name, value in model.graph.initializers.items() if name.endswith(".weight_codes"))
    assert types["INT4"] > types["INT8"] > 0


def test_no_float_weight_of_a_site_is_left(tables):
    model, site_nodes = tables
    assert not {f"{site}.weight" for site in site_nodes} & set(model.graph.initializers)


def test_a_scale_that_every_row_shares_needs_no_lookup():
    model, _ = graph_from_artifact(constant_tables(artifact_by_hand()), torch.float32, "int8")
    table, _ = graph_from_artifact(artifact_by_hand(), torch.float32, "int8")
    assert ops(model)["Gather"] < ops(table)["Gather"]

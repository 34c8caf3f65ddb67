import json

import pytest

from edm_deploy.runtime.manifest import GraphSite
from engines.nvidia.layer_audit import EngineLayer, audit, layers_from_inspector, layers_from_log

TENSOR = "{{ Name: t, Dimensions: [{dims}], Strides: [1], StrideOrder: [1,0], Datatype: {kind}, Format: (Linear) Row major linear format }}"
WEIGHT = TENSOR.format(dims="64,64,3,3", kind="Int8")


def log(kind: str, inputs: str, outputs: str = "Float", constants: str = WEIGHT) -> str:
    tensors = ", ".join(TENSOR.format(dims="-1,64,32,32", kind=name) for name in inputs.split())
    line = (
        f"Name: down.0/conv_myl0_7, LayerType: {kind}, Inputs: [ {tensors}], Constants: [ {constants}], "
        f"Outputs: [ {TENSOR.format(dims='-1,64,32,32', kind=outputs)}], TacticName: __stub, StreamId: 0, "
        "Metadata: [ONNX Layer: down.0/sum][ONNX Layer: down.0/weight]"
    )
    return f"Layers:\n{line}\nName: wait_1, LayerType: wait, Inputs: [], Outputs: [], StreamId: 1\n\nI/O Tensors:\nName: sample, IOMode: Input\n"


SITES = {"down.0": GraphSite("down.0/sum", "conv2d", "W4A4")}


def test_a_layer_table_is_read_line_by_line():
    first, second = layers_from_log(["some other message", log("correlation", "Int8")])
    assert first == EngineLayer("down.0/conv_myl0_7", "correlation", ("Int8",), ("Int8",), ("Float",), ("down.0/sum", "down.0/weight"))
    assert (second.name, second.type, second.nodes) == ("wait_1", "wait", ())


def test_a_site_on_int8_operands_passes():
    assert audit(layers_from_log([log("correlation", "Int8")]), SITES)["down.0"].problem is None


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (log("correlation", "Half"), "floating-point arithmetic on dequantized values"),
        (log("gemm", "Int8", constants=""), "floating-point arithmetic"),
        (log("kgen", "Int8"), "no product layer bears its name, only kgen"),
        (log("gemm", "Int8", outputs="Half"), "overflows past 65504"),
        ("Layers:\n", "no product layer bears its name, only nothing"),
    ],
)
def test_a_site_that_is_not_computed_in_integers_is_found(table, problem):
    assert problem in (audit(layers_from_log([table]), SITES)["down.0"].problem or "")


def test_one_target_out_of_two_in_floating_point_is_found():
    tables = [log("correlation", "Int8"), log("correlation", "Half")]
    assert audit(layers_from_log(tables), SITES)["down.0"].problem


def test_a_weight_only_site_is_not_audited():
    assert audit([], {"down.0": GraphSite("down.0/sum", "conv2d", "W4A16")}) == {}


def test_the_inspectors_json_gives_the_same_layers():
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "down.0/sum",
                    "LayerType": "CaskConvolution",
                    "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
                    "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32 Float"}],
                    "Weights": {"Type": "Int8", "Count": 36864},
                    "Metadata": "[ONNX Layer: down.0/sum]",
                }
            ]
        }
    )
    assert audit(layers_from_inspector(text), SITES)["down.0"].problem is None

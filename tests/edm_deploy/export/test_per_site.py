import numpy as np
import pytest
import torch

from edm_deploy.artifact.reference import Reference
from edm_deploy.export.per_site import onnx_cut_at_sites
from tests.conftest import artifact_by_hand, tiny_inputs

ort = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_each_site_of_the_graph_gives_the_codes_of_the_reference(tmp_path, dtype):
    artifact = artifact_by_hand(weight_bits=8, act_bits=8)
    inputs = tiny_inputs("unet2d", batch=4)
    records = Reference(artifact).record(inputs)
    manifest = onnx_cut_at_sites(artifact, records, tmp_path / "cut", dtype=dtype)
    session = ort.InferenceSession(tmp_path / "cut" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"timestep": inputs["timestep"].numpy()}
    feeds |= {declared.name: records[declared.name.removesuffix(".x")].x.numpy() for declared in manifest.inputs[1:]}
    outputs = dict(zip(manifest.outputs, session.run(list(manifest.outputs), feeds), strict=True))
    for site, record in records.items():
        # Same float32 reciprocal, one multiplication, same rounding: not one code may differ.
        assert np.array_equal(outputs[f"{site}.codes"], record.codes.numpy().astype(np.int8)), site
        # The graph sums codes times dequantized weights in float32: a few units in the last place of the largest term.
        assert torch.allclose(torch.from_numpy(outputs[f"{site}.y"]), record.y, atol=float(record.y.abs().max()) * 1e-5), site


def test_a_weight_only_site_begins_at_its_layer(tmp_path):
    artifact = artifact_by_hand(act_bits=16)
    records = Reference(artifact).record(tiny_inputs("unet2d"))
    manifest = onnx_cut_at_sites(artifact, records, tmp_path / "cut")
    assert "mid_block.resnets.0.conv1.y" in manifest.outputs
    assert "mid_block.resnets.0.conv1.codes" not in manifest.outputs
    assert "conv_in.codes" in manifest.outputs

"""A whole W4A4 denoiser through the source of the CUDA kernels, run on the CPU by the emulator."""

import pytest
import torch

from edm_deploy.artifact.reference import Reference
from engines.kernels import cuda_ops, torch_ops
from engines.torch_graph import fusions
from engines.torch_graph.rewrite import cut_at_layers
from tests.conftest import artifact_by_hand, tiny_inputs
from tests.engines.rewritten import drafted_artifact, program_of


@pytest.fixture
def emulated(launched, monkeypatch):
    """A function that routes the operators to the CUDA path, whose kernels run in the emulator, and the names of the kernels that ran."""

    def route():
        for name in ("quantize", "group_stats", "convolve"):
            monkeypatch.setattr(torch_ops, name, getattr(cuda_ops, name))

    return route, launched


def test_every_site_of_a_whole_model_has_the_bits_of_the_cpu_and_is_the_references(emulated):
    route, entries = emulated
    artifact, inputs = artifact_by_hand(), tiny_inputs("unet2d", 1)
    draft = drafted_artifact(artifact, program_of("unet2d"))
    reference = Reference(artifact)
    seen = {name: record.x.half() for name, record in reference.record(inputs).items()}
    given = {placeholder: seen[name] for name, placeholder in cut_at_layers(draft).items()}
    module = draft.module()
    expected_codes, expected = module(inputs["timestep"], *given.values())
    route()
    codes, outputs = module(inputs["timestep"], *given.values())
    records = reference.at_sites({name: x.float() for name, x in seen.items()}, inputs["timestep"])
    for name in artifact.sites:
        assert torch.equal(codes[name], expected_codes[name]), name
        assert torch.equal(outputs[name], expected[name]), name
        assert (outputs[name].float() - records[name].y).abs().max() <= 2**-11 * records[name].y.abs().max(), (
            name
        )  # one rounding to float16
    assert {entry.split("_")[1] for entry in entries if entry.startswith("conv_")} == {"u4", "s8"}


def test_a_whole_fused_model_runs_through_the_kernels(emulated):
    route, entries = emulated
    artifact, inputs = artifact_by_hand(), tiny_inputs("unet2d", 1)
    draft = drafted_artifact(artifact, program_of("unet2d"))
    fusions.fuse(draft)
    module = draft.module()
    (expected,) = module(*inputs.values())
    route()
    (found,) = module(*inputs.values())
    assert (
        found - expected
    ).norm() < 0.5 * expected.norm()  # SiLU and statistics in the GPU's own rounding: a tie in W4A4 is a seventh of a range
    assert {entry.rsplit("_", 1)[-1] for entry in entries if entry.startswith("quantize_")} >= {"plain", "silu", "norm"}

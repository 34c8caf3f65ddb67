"""The parts of an engine file that backends share. Whole engines are opened in test_cuda.py, test_cpu.py and tests/contracts/."""

from dataclasses import replace

import pytest
import torch

from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import CAPABILITIES, SitePlan
from engines import backend_named, build_engine
from engines.from_artifact import packed_engine
from engines.from_artifact.packed_engine import (
    PARAMS,
    ROWS,
    accepted_plan,
    adapter_weights,
    open_graph,
    packed_tensors,
    plan_with_reasons,
    refuse_foreign,
    requested_adapters,
)
from tests.conftest import artifact_by_hand

NARROW = replace(CAPABILITIES["cpu"], filters=((1, 1),))  # a backend that has kernels for 1x1 only
ACCEPTED = BuildOptions(allow_float_sites=True)


@pytest.fixture(scope="module")
def manifest(artifact_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    return build_engine(artifact_w4a4.save(path / "a"), path / "engine", backend="cpu", options=BuildOptions(lora_rank=2))


def test_every_site_has_a_kernel_or_a_reason(artifact_w4a4):
    plans, reasons = plan_with_reasons(artifact_w4a4, CAPABILITIES["cpu"])
    assert reasons == {}
    assert {plan.executed for plan in plans.values()} == {"int8"}
    plans, reasons = plan_with_reasons(artifact_w4a4, NARROW)
    assert reasons["conv_in"] == "a 3x3 filter"
    assert plans["conv_in"] == SitePlan("W8A8", "float")
    assert plans["time_embedding.linear_1"].executed == "int8"


def test_sites_without_a_kernel_are_refused_or_accepted_with_a_warning_for_each(artifact_w4a4):
    with pytest.raises(
        UnsupportedError, match=r"\d+ of 51 quantized sites have no integer kernel in cpu; first 'conv_in': a 3x3 filter\. Accept"
    ):
        accepted_plan(artifact_w4a4, NARROW, BuildOptions())
    plans, warnings = accepted_plan(artifact_w4a4, NARROW, ACCEPTED)
    assert len(warnings) == sum(plan.executed == "float" for plan in plans.values())
    assert warnings[0] == "conv_in: a 3x3 filter; exact codes, floating-point arithmetic."


def test_weight_only_sites_are_counted_in_one_warning():
    _, warnings = accepted_plan(artifact_by_hand(act_bits=16), CAPABILITIES["cpu"], BuildOptions())
    assert [warning.split(":")[0] for warning in warnings] == ["41 sites quantize their weights only"]


def test_parameters_are_stored_in_the_engines_type_and_vectors_in_float32(artifact_w4a4):
    plans, _ = plan_with_reasons(artifact_w4a4, CAPABILITIES["cpu"])
    tensors = packed_tensors(artifact_w4a4, plans, torch.bfloat16)
    floats = {name: value for name, value in tensors.items() if name.startswith(PARAMS)}
    assert {value.dtype for value in floats.values() if value.ndim == 1} == {torch.float32}
    assert {value.dtype for value in floats.values() if value.ndim > 1} <= {torch.bfloat16}
    assert torch.equal(tensors[ROWS], artifact_w4a4.row_of_timestep)


def test_cuda_and_cpu_pack_the_same_file(artifact_w4a4):
    files = [
        packed_tensors(artifact_w4a4, plan_with_reasons(artifact_w4a4, CAPABILITIES[name])[0], torch.float16) for name in ("cuda", "cpu")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_layers_for_adapters_need_a_rank(artifact_w4a4):
    assert requested_adapters(artifact_w4a4, BuildOptions()) is None
    assert requested_adapters(artifact_w4a4, BuildOptions(lora_rank=3)).rank == 3
    with pytest.raises(InputError, match="--lora-layers names the layers of --lora-rank"):
        requested_adapters(artifact_w4a4, BuildOptions(lora_layers="."))


def test_weights_of_adapters_are_kept_and_their_scales_are_not(manifest):
    assert adapter_weights(manifest) == {declared.name for declared in manifest.adapters.weights}
    assert adapter_weights(manifest) < {declared.name for declared in manifest.adapters.inputs}
    assert adapter_weights(replace(manifest, adapters=None)) == frozenset()


def test_an_engine_of_another_backend_layout_or_packing_is_refused(manifest):
    refuse_foreign(manifest, "cpu")
    with pytest.raises(UnsupportedError, match=r"built by cpu and cannot be opened with cuda\. Open it with cpu"):
        refuse_foreign(manifest, "cuda")
    with pytest.raises(UnsupportedError, match=r"packed in layout 0; this edm-deploy reads 1\. Build it again with .* --backend cpu"):
        refuse_foreign(replace(manifest, build={**manifest.build, "layout": 0}), "cpu")
    with pytest.raises(ArtifactError, match="Site 'conv_in' has codes 's2', which no kernel reads"):
        refuse_foreign(replace(manifest, plan={"conv_in": SitePlan("W2A2", "int8", "s2")}), "cpu")


def test_a_file_that_is_not_the_models_is_refused_when_it_is_opened(manifest, artifact_w4a4):
    tensors = packed_tensors(artifact_w4a4, manifest.plan, torch.bfloat16)
    kinds = dict.fromkeys(manifest.sites, "s8")
    with pytest.raises(ArtifactError, match=r"Parameters: the engine holds no conv_in\.bias"):
        open_graph(manifest, {name: value for name, value in tensors.items() if name != f"{PARAMS}conv_in.bias"}, kinds)
    with pytest.raises(ArtifactError, match="row_of_timestep points outside the 5 table rows"):
        open_graph(manifest, tensors | {ROWS: tensors[ROWS] + 5}, kinds)
    sites = {**manifest.sites, "other": manifest.sites["conv_in"]}
    with pytest.raises(ArtifactError, match="Site 'other' is no layer of the model"):
        open_graph(replace(manifest, sites=sites), tensors, kinds)


def test_both_backends_take_the_type_between_the_sites_from_the_engine(manifest):
    assert packed_engine.site_dtype(manifest) == torch.bfloat16
    assert backend_named("cuda").site_dtype(manifest) == backend_named("cpu").site_dtype(manifest) == torch.bfloat16

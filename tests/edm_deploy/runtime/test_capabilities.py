import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.capabilities import CAPABILITIES, capabilities_of, check_plugins, check_scheme, check_storage, plan_layers, summary
from tests.conftest import artifact_by_hand


@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize("bits", [(2, 3), (4, 4), (8, 8)], ids=str)
def test_every_target_carries_what_fits_int8_codes(backend, bits):
    check_scheme(capabilities_of(backend), *bits)


@pytest.mark.parametrize(
    ("backend", "bits", "message"),
    [
        ("ort", (1, 8), "W1A8 cannot be carried by ort.*Nearest: W2A8"),
        ("openvino", (4, 2), "W4A2 cannot be carried by openvino.*Nearest: W4A3"),
        ("trt-rtx", (4, 16), "W4A16 cannot be carried by trt-rtx.*Nearest: W4A8"),
        ("trt", (9, 9), "W9A9 cannot be carried by trt.*Nearest: W8A8"),
    ],
)
def test_a_scheme_that_cannot_be_carried_is_refused_with_the_nearest(backend, bits, message):
    with pytest.raises(UnsupportedError, match=message):
        check_scheme(capabilities_of(backend), *bits)


def test_weight_only_is_carried_where_the_target_says_so():
    check_scheme(capabilities_of("ort"), 4, 16)


def test_packed_weights_are_refused_where_they_cannot_be_read():
    check_storage(capabilities_of("ort"), "int4")
    with pytest.raises(UnsupportedError, match=r"trt-rtx does not read packed INT4 weights.*--weight-storage int8"):
        check_storage(capabilities_of("trt-rtx"), "int4")


def test_plugin_nodes_are_for_tensorrt_alone():
    check_plugins(capabilities_of("trt"), 47)
    check_plugins(capabilities_of("ort"), 0)
    check_plugins(None, 0)
    with pytest.raises(
        UnsupportedError, match=r"trt-rtx does not run INT4 plugin nodes, which only trt does.*Export again without --int4 plugin"
    ):
        check_plugins(capabilities_of("trt-rtx"), 47)
    with pytest.raises(UnsupportedError, match=r"--int4 plugin writes nodes that only trt runs\. Add --for trt"):
        check_plugins(None, 1)


def test_an_unknown_backend_gets_the_nearest():
    with pytest.raises(UnsupportedError, match="Did you mean 'trt-rtx'"):
        capabilities_of("trtrtx")


def test_weights_that_are_packed_in_four_bits_run_as_int4_only_where_that_is_multiplied():
    artifact = artifact_by_hand()
    on_gpu, on_cpu = (plan_layers(artifact, capabilities_of(name)) for name in ("cuda", "cpu"))
    assert {name: plan.codes for name, plan in on_gpu.items()} == {name: plan.codes for name, plan in on_cpu.items()}
    assert {plan.executed for plan in on_gpu.values()} == {"int4", "int8"}
    assert {plan.executed for plan in on_cpu.values()} == {"int8"}
    assert {plan.codes for plan in plan_layers(artifact, capabilities_of("openvino")).values()} == {None}


def test_the_plan_says_what_is_stored_and_what_is_executed():
    sites = plan_layers(artifact_by_hand(), capabilities_of("ort"))
    assert (sites["conv_in"].stored, sites["conv_in"].executed) == ("W8A8", "float")
    assert (sites["time_embedding.linear_1"].stored, sites["time_embedding.linear_1"].executed) == ("W8A8", "int8")
    assert "sites stored W4A4, executed as float" in summary(sites)
    weight_only = plan_layers(artifact_by_hand(act_bits=16), capabilities_of("openvino"))
    assert weight_only["mid_block.resnets.0.conv1"].executed == "weight-only"

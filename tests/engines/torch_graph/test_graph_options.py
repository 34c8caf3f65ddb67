from edm_deploy.runtime.backend import BuildOptions
from engines.torch_graph.graph_options import GraphOptions


def test_what_is_not_requested_is_the_default():
    assert GraphOptions.requested(BuildOptions()).to_json() == {"rest": "eager", "attention": "float"}
    assert GraphOptions.requested(BuildOptions(attention="int8")) == GraphOptions(rest="eager", attention="int8")


def test_an_engine_of_an_earlier_version_has_the_defaults():
    assert GraphOptions.recorded({"gpu": "sm_86", "precision": "fp16"}) == GraphOptions()
    recorded = GraphOptions.recorded({"gpu": "sm_86", "rest": "inductor", "attention": "int8"})
    assert recorded == GraphOptions(rest="inductor", attention="int8")
    assert GraphOptions.recorded(recorded.to_json()) == recorded

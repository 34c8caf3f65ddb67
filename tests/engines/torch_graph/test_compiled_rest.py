import importlib.util

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from engines.torch_graph import fusions
from engines.torch_graph.compiled_rest import compiled_by, compiled_rest
from tests.engines.rewritten import drafted, site_of
from tests.engines.torch_graph.test_fusions import TIMESTEPS, TokensOfAMap


@pytest.fixture(scope="module")
def module():
    model, x = TokensOfAMap(read_twice=True), torch.randn(2, 8, 4, 3).half()
    rewritten = drafted(model, {"proj_in": site_of(model.proj_in), "proj_out": site_of(model.proj_out)}, x)
    fusions.fuse(rewritten)
    return rewritten.module()


def test_it_is_one_graph_in_which_our_operators_stay(module):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(2, 8, 4, 3).half()
    (found,) = compiled_by(module, backend)(x, TIMESTEPS)
    assert torch.equal(found, module(x, TIMESTEPS)[0])
    (graph,) = graphs
    ours = [str(node.target) for node in graph.graph.nodes if "edm_deploy" in str(node.target)]
    assert sorted(ours) == ["edm_deploy.linear.default"] * 2 + ["edm_deploy.quantize.default"] * 2


def test_on_the_cpu_the_graph_is_decomposed_and_gives_the_same_bits(module):
    x = torch.randn(2, 8, 4, 3).half()
    compiled = compiled_rest(module, torch.device("cpu"))
    for batch in (x, torch.cat([x, x])):
        timesteps = TIMESTEPS.repeat(len(batch) // 2)
        (expected,), (found,) = module(batch, timesteps), compiled(batch, timesteps)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # a decomposed norm rounds to float16 elsewhere


def test_without_triton_the_remedy_is_named(module, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"built with --rest inductor, which needs Triton.*--rest eager"):
        compiled_rest(module, torch.device("cuda"))

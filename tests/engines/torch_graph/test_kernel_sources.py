import torch
from torch import nn

from edm_deploy.network.restructure import NetworkRewrite
from engines.kernels.build import BRANCH, DOWN, ROTATED
from engines.torch_graph.kernel_sources import kernel_sources
from tests.engines.torch_graph.fusions.test_branches import Map, Tokens, both, tokens


def sources(model: nn.Module, x: torch.Tensor, structure: NetworkRewrite) -> tuple[str, ...]:
    return kernel_sources(both(model, x, structure)[1].graph)


def test_a_graph_needs_the_files_of_what_it_calls():
    x = torch.randn(2, 32, 4, 4).half()
    assert sources(Tokens(), tokens(), NetworkRewrite()) == ()
    assert sources(Tokens(), tokens(), NetworkRewrite(rotated={"down": 32})) == (ROTATED,)
    assert sources(Tokens(), tokens(), NetworkRewrite(rotated={"q": 32, "k": 32})) == (ROTATED,)
    assert sources(Tokens(), tokens(), NetworkRewrite(branches={"down": 8})) == (BRANCH, DOWN)
    assert sources(Map(), x, NetworkRewrite(branches={"conv": 8})) == (BRANCH,)

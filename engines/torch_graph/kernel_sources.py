"""The files of kernels that a rewritten graph calls beside `kernels.cu`."""

from __future__ import annotations

from torch import fx

from engines.kernels import build
from engines.torch_graph.fx_helpers import calls
from engines.torch_graph.rewrite import kernels


def kernel_sources(graph: fx.Graph) -> tuple[str, ...]:
    """Names of files in `engines/kernels/cuda/`: of kernels that rotate, add a branch, or multiply by its first matrix while quantizing."""
    found = {
        build.ROTATED: _any(graph, "quantize", "rotation") or _any(graph, "quantize_row_normed", "rotation"),
        build.BRANCH: _any(graph, "conv2d", "up") or _any(graph, "linear", "up"),
        build.DOWN: bool(calls(graph, kernels.quantize_branch.default)),
    }
    return tuple(source for source, needed in found.items() if needed)


def _any(graph: fx.Graph, operator: str, argument: str) -> bool:
    """Whether a call of one of our operators has an argument that is neither None nor 0."""
    target = getattr(kernels, operator).default
    place = [each.name for each in target._schema.arguments].index(argument)
    return any(node.args[place] for node in calls(graph, target))

"""A recording against the same graph run node by node, on a tiny denoiser and on operators by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from edm_deploy.errors import UnsupportedError
from engines.kernels import ops
from engines.kernels.cpu.launch import KERNELS
from engines.kernels.cpu.memory import Memory
from engines.kernels.cpu.ops import RecordedOps
from engines.kernels.cpu.weights import Weights
from engines.torch_graph.fusions import fuse
from engines.torch_graph.fx_helpers import aten
from engines.torch_graph.recorded_graph import RecordedGraph
from tests.conftest import artifact_by_hand, tiny_inputs
from tests.engines.rewritten import drafted_artifact, program_of


def steps(recorded: RecordedGraph) -> list[str]:
    return [KERNELS[step[0]] if isinstance(step, tuple) else "torch" for step in recorded._ops.steps]


def graph_of(function, *examples: Tensor) -> fx.GraphModule:
    """A function's graph of aten operators."""
    module = torch.nn.Module()
    module.forward = function
    return torch.export.export(module, examples, strict=False).module(check_guards=False)


def record(module: fx.GraphModule, *inputs: Tensor) -> RecordedGraph:
    return RecordedGraph(module, inputs, Weights(), 2)


@pytest.fixture(scope="module")
def denoiser(artifact_w4a4) -> fx.GraphModule:
    rewritten = drafted_artifact(artifact_w4a4, program_of("unet2d"), kind="s8")
    fuse(rewritten)
    return rewritten.module()


class NodeByNode(fx.Interpreter):
    """The same kernels, but each result in memory of its own, and torch's operators as they are."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.memory = Memory()
        self.memory.free = lambda storage: None
        self.kernels = RecordedOps(Weights(), self.memory, 1)

    def call_function(self, target, args, kwargs):
        if target is aten.scaled_dot_product_attention.default:
            return self.kernels.attention(*args, kwargs.get("scale"))
        with ops.implemented_by(self.kernels):
            return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_replay_is_the_graph_node_by_node(batch, denoiser):
    """The same bits, for other inputs than the recorded ones: no block is reused while it is still read."""
    first, second = (list(tiny_inputs("unet2d", batch=batch, seed=seed).values()) for seed in (1, 2))
    with torch.no_grad():
        recorded = record(denoiser, *first)
        for inputs in (second, first):
            alone = NodeByNode(denoiser)
            assert torch.equal(recorded.run(inputs)[0], alone.run(*inputs)[0])
    assert recorded.bytes < alone.memory.total / 2


def test_a_model_that_writes_in_place_is_repeated():
    """The skip blocks of NCSN++ add to a sample in place, and normalize constants."""
    rewritten = drafted_artifact(artifact_by_hand("skip"), program_of("skip"), kind="s8")
    fuse(rewritten)
    module = rewritten.module()
    assert any(getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in module.graph.nodes)
    first, second = (list(tiny_inputs("skip", batch=2, seed=seed).values()) for seed in (1, 2))
    with torch.inference_mode():
        recorded = record(module, *first)
        for inputs in (second, first, first):
            assert torch.equal(recorded.run(inputs)[0], NodeByNode(module).run(*inputs)[0])


def test_the_kernels_do_what_they_can(denoiser):
    with torch.no_grad():
        found = steps(record(denoiser, *tiny_inputs("unet2d", batch=3).values()))
    assert {"quantize", "group_stats", "attention", "copy", "upsample"} <= set(found)
    assert {"convolve", "winograd"} & set(found)


def test_results_of_torch_are_copied_and_views_are_not():
    x = torch.randn(2, 3, 4).bfloat16()
    module = graph_of(lambda x: (x.transpose(1, 2).exp().transpose(1, 2)[:, :2], x.mean(0)), x)
    with torch.no_grad():
        recorded = record(module, x)
        other = torch.randn(2, 3, 4).bfloat16()
        found = recorded.run([other])
    assert torch.equal(found[0], other.exp()[:, :2])
    assert torch.equal(found[1], other.mean(0))
    assert steps(recorded) == ["torch", "torch"]


def test_operators_with_several_results_are_recorded():
    x = torch.randn(4, 6)
    module = graph_of(lambda x: torch.add(*torch.sort(x, dim=1)) + x.chunk(2)[0].sum(), x)
    with torch.no_grad():
        recorded = record(module, x)
        other = torch.randn(4, 6)
        found = recorded.run([other])[0]
    values, places = torch.sort(other, dim=1)
    assert torch.equal(found, values + places + other[:2].sum())


def test_channels_last_maps_are_concatenated_and_upsampled_by_kernels():
    x = torch.randn(2, 8, 3, 3).half().to(memory_format=torch.channels_last)

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(torch.cat([x, 2 * x], 1), scale_factor=2.0, mode="nearest")

    with torch.no_grad():
        recorded = record(graph_of(function, x), x)
        other = torch.randn(2, 8, 3, 3).half()
        found = recorded.run([other])[0]
    assert torch.equal(found, function(other))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert steps(recorded) == ["torch", "copy", "copy", "upsample"]


def test_parts_of_several_dtypes_or_without_elements_are_concatenated():
    x = torch.randn(2, 4)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, x.bfloat16()], 1), torch.cat([x[:, :0], x, x[:, 4:]], 1)

    with torch.no_grad():
        found = record(graph_of(function, x), x).run([2 * x])
    assert torch.equal(found[0], function(2 * x)[0])
    assert torch.equal(found[1], 2 * x)


@pytest.mark.parametrize("scale_factor", [1.5, (2.0, 3.0)])
def test_other_upsampling_stays_with_torch(scale_factor):
    x = torch.randn(1, 4, 4, 4).half()

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x, scale_factor=scale_factor, mode="nearest")

    with torch.no_grad():
        recorded = record(graph_of(function, x), x)
        assert torch.equal(recorded.run([2 * x])[0], function(2 * x))
    assert "upsample" not in steps(recorded)


def test_attention_with_a_mask_stays_with_torch():
    q = torch.randn(2, 5, 8).bfloat16()
    mask = torch.zeros(5, 5).bfloat16().fill_diagonal_(-9.0)

    def function(q: Tensor, mask: Tensor | None) -> Tensor:
        heads = q[None]
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)

    with torch.no_grad():
        masked = record(graph_of(function, q, mask), q, mask)
        torch.testing.assert_close(masked.run([2 * q, mask])[0], function(2 * q, mask), rtol=2e-2, atol=2e-2)
        plain = record(graph_of(lambda q: function(q, None), q), q)
        torch.testing.assert_close(plain.run([2 * q])[0], function(2 * q, None), rtol=2e-2, atol=2e-2)
    assert (steps(masked), steps(plain)) == (["torch"] * len(steps(masked)), ["attention"])


def test_operators_that_write_to_an_argument_are_repeated():
    x = torch.randn(2, 4)

    def function(x: Tensor) -> Tensor:
        y = x * 2
        view = y[:, 1:]
        y.add_(1)
        view.mul_(x[:, :3])
        return y + torch.tensor([1.0, 2.0, 3.0, 4.0]).div_(2)

    with torch.inference_mode():
        recorded = record(graph_of(function, x), x)
        for inputs in (3 * x, x, x):
            assert torch.equal(recorded.run([inputs])[0], function(inputs))


def test_a_write_to_a_constant_is_refused():
    module = graph_of(lambda x: x + 1, torch.zeros(3))
    module.register_buffer("constant", torch.ones(3))
    (x,) = (node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(x):
        constant = module.graph.get_attr("constant")
    with module.graph.inserting_after(constant):
        written = module.graph.call_function(aten.add_.Tensor, (constant, x))
    module.graph.output_node().args = ((written,),)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="writes to a constant of the model"):
        record(module, torch.zeros(3))


def test_a_number_read_from_a_tensor_is_refused():
    module = graph_of(lambda x: x + 1, torch.zeros(3))
    (x,) = (node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(x):
        number = module.graph.call_function(aten.max.default, (x,))
    with module.graph.inserting_after(number):
        read = module.graph.call_function(aten.item.default, (number,))
    module.graph.output_node().args = ((read,),)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="reads a number from a tensor"):
        record(module, torch.zeros(3))


def test_kept_inputs_are_read_where_they_are():
    x, kept = torch.zeros(3), torch.ones(3)
    with torch.no_grad():
        recorded = RecordedGraph(graph_of(lambda x, y: x * y, x, kept), [x, kept], Weights(), 1, frozenset({1}))
        kept.fill_(5)
        assert recorded.run([torch.full((3,), 2.0), kept])[0].tolist() == [10.0] * 3

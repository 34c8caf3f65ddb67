"""The kernels against `fake_quantize`: results bit for bit, gradients against float64, for each instruction set that this machine can compile for and run."""

import functools

import pytest
import torch

from calibration.student.fake_quant import fake_quantize
from calibration.training.cpp import fake_quant
from calibration.training.cpp.fake_quant import cpp_fake_quantize
from calibration.training.cpp.library import FAKE_QUANT_CHUNK, library
from edm_deploy.numerics.activation_table import reciprocal
from edm_deploy.numerics.codes import per_channel
from tests.calibration.student import test_compiled_fake_quant
from tests.engines.kernels.cpu.test_ops import FLAGS, NEEDS, TARGETS

SHAPES = {
    "channels_last": (3, 5, 7, 3),
    "contiguous": (3, 4, 2, 5),
    "tokens": (3, 7, 4),
    "linear": (3, 6),
    "several chunks": (3, 2 * FAKE_QUANT_CHUNK + 21),
}
LEVELS = {"one": 15, "by row": torch.tensor([15.0, 14.0, 3.0])}


@pytest.fixture(
    params=[name if name in ("native", "avx2") else pytest.param(name, marks=pytest.mark.extended) for name in TARGETS], autouse=True
)
def target(request, monkeypatch) -> None:
    if missing := NEEDS.get(request.param, set()) - FLAGS:
        pytest.skip(f"this CPU cannot run code for {request.param}: it has no {', '.join(sorted(missing))}")
    monkeypatch.setattr(fake_quant, "library", functools.partial(library, TARGETS[request.param]))


problem = functools.partial(test_compiled_fake_quant.problem, shapes=SHAPES)


def gradients(function, name, dtype, levels):
    arguments, grad = problem(name, dtype)
    y = function(*arguments, levels)
    return y, torch.autograd.grad(y, arguments, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", SHAPES)
def test_results_and_gradients_are_those_of_torchs_operators(name, levels, dtype):
    found, ours = gradients(cpp_fake_quantize, name, dtype, LEVELS[levels])
    expected, theirs = gradients(fake_quantize, name, dtype, LEVELS[levels])
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    (x, scale, qmin), grad = problem(name, dtype)
    exact = exact_gradients(x.detach(), grad, scale.detach(), qmin.detach(), LEVELS[levels])
    assert torch.equal(ours[0].double(), exact[0])
    assert all(torch.allclose(each.double(), right, rtol=1e-5, atol=1e-4) for each, right in zip(ours[1:], exact[1:], strict=True))


def exact_gradients(x, grad, scale, qmin, levels):
    """In float64, as the docstring of `fake_quantize` has them, from the float32 quotients that both round."""
    low = per_channel(qmin, x).double()
    high = low + (levels if isinstance(levels, int) else per_channel(levels, x))
    u, grad = (x.float() * per_channel(reciprocal(scale), x)).double(), grad.double()
    inside = (u > low - 0.5) & (u < high + 0.5)
    to_scale = grad * torch.where(inside, u.round().clamp(low, high) - u, torch.where(u < low, low, high))
    outside = torch.where(inside, 0, grad)
    return grad - outside, to_scale.flatten(1).sum(1), outside.flatten(1).sum(1) * scale


def test_what_is_no_number_stays_none():
    """Otherwise a training that diverges would not be noticed."""
    x = torch.tensor([[torch.nan, 1.0, torch.inf, -torch.inf]]).repeat(1, 5)
    for dtype in (torch.float32, torch.bfloat16):
        y = cpp_fake_quantize(x.to(dtype), torch.tensor([0.5]), torch.tensor([-3.0]), 7)
        assert y[0, :4].tolist()[1:] == [1.0, 2.0, -1.5]
        assert bool(y[0, ::4].isnan().all())


def test_sums_do_not_depend_on_the_number_of_threads():
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            found.append(gradients(cpp_fake_quantize, "several chunks", torch.float32, 15))
        finally:
            torch.set_num_threads(threads)
    (y, first), (other, second) = found
    assert torch.equal(y, other)
    assert all(torch.equal(each, again) for each, again in zip(first, second, strict=True))


def test_other_inputs_are_computed_by_torch_or_copied():
    scale, qmin = torch.tensor([0.5, 0.25]), torch.tensor([-3.0, 0.0])
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cpp_fake_quantize(x.half(), scale, qmin, 7), fake_quantize(x.half(), scale, qmin, 7))
    strided = torch.stack([x, x], dim=2)[..., 0]
    assert torch.equal(cpp_fake_quantize(strided, scale, qmin, 7), fake_quantize(x, scale, qmin, 7))
    expanded = scale[:1].expand(2)
    assert torch.equal(cpp_fake_quantize(x, expanded, qmin, 7), fake_quantize(x, expanded.clone(), qmin, 7))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_an_empty_input_has_gradients_of_0(shape):
    arguments = [torch.ones(shape, requires_grad=True), *(torch.ones(shape[0], requires_grad=True) for _ in range(2))]
    cpp_fake_quantize(*arguments, 7).sum().backward()
    assert [each.grad.tolist() for each in arguments] == [torch.zeros(shape).tolist(), *([0.0] * shape[0] for _ in range(2))]


def test_one_range_for_all_rows_is_read_for_each():
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for function in (cpp_fake_quantize, fake_quantize):
        scale, qmin = torch.tensor([0.3], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
        y = function(x, scale.expand(3), qmin.expand(3), 7) if function is fake_quantize else function(x, scale, qmin, 7)
        y.square().sum().backward()
        found.append((y.detach(), scale.grad, qmin.grad))
    assert all(torch.allclose(one, two, rtol=1e-5) for one, two in zip(*found, strict=True))


def test_a_gradient_in_another_layout_is_read_as_what_it_is():
    (x, scale, qmin), grad = problem("channels_last", torch.float32)
    y = cpp_fake_quantize(x, scale, qmin, 15)
    expected = torch.autograd.grad(y, [x], grad, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, [x], grad.contiguous())[0], expected)

"""One float32 case compiles here, by the C++ compiler of torch.compile; the arithmetic of all others runs uncompiled."""

import pytest
import torch

from calibration.student import compiled_fake_quant
from calibration.student.compiled_fake_quant import compiled_fake_quantize
from calibration.student.fake_quant import fake_quantize

SHAPES = {"channels_last": (3, 4, 2, 5), "contiguous": (3, 4, 2, 5), "tokens": (3, 7, 4), "linear": (3, 6)}


def problem(name, dtype, shapes=SHAPES):
    """Arguments that need gradients, with values inside and outside the bounds, and an incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if name == "channels_last" else torch.contiguous_format
    x, grad = (torch.randn(shapes[name], generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    scale, qmin = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([-3.0, -7.0, 0.0])
    return [x.requires_grad_(), scale.requires_grad_(), qmin.requires_grad_()], grad


def both(name, dtype, levels):
    results = []
    for function in (fake_quantize, compiled_fake_quantize):
        arguments, grad = problem(name, dtype)
        y = function(*arguments, levels)
        results.append((y, torch.autograd.grad(y, arguments, grad)))
    return results


def check(name, dtype, levels):
    (expected, gradients), (found, others) = both(name, dtype, levels)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert [each.dtype for each in others] == [each.dtype for each in gradients]
    # Sums in float32 in another order.
    assert all(torch.allclose(other, gradient, rtol=1e-5, atol=1e-5) for other, gradient in zip(others, gradients, strict=True))


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled_fake_quant, "_compiled", lambda function: function)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("levels", [15, torch.tensor([15.0, 14.0, 3.0])], ids=["one", "by channel"])
def test_codes_and_gradients_are_those_of_the_eager_function(name, levels, uncompiled):
    check(name, torch.float32, levels)


def test_in_bfloat16_codes_are_equal_and_gradients_are_those_of_float32(uncompiled):
    (expected, _), (found, gradients) = both("channels_last", torch.bfloat16, 15)
    assert torch.equal(found, expected)
    arguments, grad = problem("channels_last", torch.bfloat16)
    wide = [each.detach().float().requires_grad_() for each in arguments]
    exact = torch.autograd.grad(fake_quantize(*wide, 15), wide, grad.float())
    assert torch.equal(gradients[0].float(), exact[0])
    # The result that the gradient of the scale reads is rounded to bfloat16.
    assert all(torch.allclose(other, gradient, rtol=2e-2, atol=2e-2) for other, gradient in zip(gradients[1:], exact[1:], strict=True))


@pytest.fixture
def compiler():
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as err:
        pytest.skip(f"no C++ compiler: {err}")


def test_compiled_codes_and_gradients_are_those_of_the_eager_function(compiler):
    check("channels_last", torch.float32, 15)

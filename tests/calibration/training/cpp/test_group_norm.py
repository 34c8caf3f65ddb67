"""The kernel against torch's group norm and SiLU in float64, for each instruction set that this machine can compile for and run; models against themselves."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.nn import functional

from calibration.training.cpp import group_norm as home
from calibration.training.cpp.group_norm import activated_norms, group_norm, use_cpp_norms
from calibration.training.cpp.library import library
from tests.conftest import TINY_CONDITION_UNET, TINY_UNET
from tests.engines.kernels.cpu.test_ops import FLAGS, NEEDS, TARGETS

# [B, C, ...], groups
SHAPES = {
    "a vector": ((2, 16, 3, 3), 4),
    "odd channels": ((3, 21, 5, 2), 7),
    "several chunks": ((2, 72, 20, 26), 8),
    "tokens": ((2, 24, 11), 6),
    "a group for each channel": ((1, 18, 4, 4), 18),
    "one group": ((2, 5, 2, 2), 1),
}
TWO_ROUNDINGS = 2**-7  # of bfloat16, of the largest value


@pytest.fixture(params=[name if name in ("native", "avx2") else pytest.param(name, marks=pytest.mark.extended) for name in TARGETS])
def target(request, monkeypatch) -> None:
    if missing := NEEDS.get(request.param, set()) - FLAGS:
        pytest.skip(f"this CPU cannot run code for {request.param}: it has no {', '.join(sorted(missing))}")
    monkeypatch.setattr(home, "library", functools.partial(library, TARGETS[request.param]))


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def problem(name, *, mean=0.0):
    """A norm with weights, its input in bfloat16, and an incoming gradient."""
    shape, groups = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(groups, shape[1])
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(shape[1], generator=generator))
    x, grad = (channels_last(torch.randn(shape, generator=generator) + start).bfloat16() for start in (mean, 0.0))
    return norm, x.requires_grad_(), grad


def exact(norm, x, grad, silu):
    wide, other = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    y = wide(other)
    y = functional.silu(y) if silu else y
    return y, torch.autograd.grad(y, [other, wide.weight, wide.bias], grad.double())


def close(found, expected, roundings=1.0):
    return float((found.double() - expected).abs().max()) <= roundings * TWO_ROUNDINGS * float(expected.abs().max())


@pytest.mark.parametrize("silu", [False, True], ids=["norm", "norm and SiLU"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_float64_rounded(name, silu, target):
    norm, x, grad = problem(name)
    y = group_norm(x, norm, silu=silu)
    gradients = torch.autograd.grad(y, [x, norm.weight, norm.bias], grad)
    right, exact_gradients = exact(norm, x, grad, silu)
    assert y.dtype == torch.bfloat16
    assert y.stride() == x.stride()
    assert torch.allclose(y.double(), right, rtol=2**-8, atol=2**-12)
    assert close(gradients[0], exact_gradients[0])
    assert all(
        torch.allclose(each.double(), other, rtol=1e-3, atol=1e-3) for each, other in zip(gradients[1:], exact_gradients[1:], strict=True)
    )


def test_a_large_mean_does_not_hide_the_variance(target):
    norm, x, grad = problem("several chunks", mean=50.0)
    y = group_norm(x, norm, silu=True)
    assert torch.allclose(y.double(), exact(norm, x, grad, True)[0], rtol=2**-8, atol=2**-10)


def test_results_do_not_depend_on_threads_nor_on_the_other_samples(target):
    norm, x, grad = problem("several chunks")
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            y = group_norm(x, norm, silu=True)
            found.append((y.detach(), *torch.autograd.grad(y, [x, norm.weight], grad)))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert torch.equal(group_norm(x[1:], norm, silu=True), found[0][0][1:])


def test_fixed_and_missing_weights(target):
    norm, x, grad = problem("a vector")
    norm.requires_grad_(False)
    expected = exact(norm.requires_grad_(True), x, grad, True)
    norm.requires_grad_(False)
    (gradient,) = torch.autograd.grad(group_norm(x, norm, silu=True), [x], grad)
    assert close(gradient, expected[1][0])
    plain = nn.GroupNorm(4, 16, affine=False)
    assert torch.allclose(group_norm(x, plain).double(), plain(x.double()), rtol=2**-8, atol=2**-12)


def test_a_gradient_in_another_layout_or_dtype_is_read_as_what_it_is():
    norm, x, grad = problem("several chunks")
    y = group_norm(x, norm, silu=True)
    expected = torch.autograd.grad(y, [x], grad, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, [x], grad.contiguous())[0], expected)


def test_feature_maps_become_channels_last():
    norm, x, _ = problem("several chunks")
    y = group_norm(x.detach().contiguous(), norm, silu=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, group_norm(x, norm, silu=True))


def test_other_inputs_are_computed_by_torch():
    norm, x, _ = problem("tokens")
    for other in (x.detach().float(), x.detach().contiguous(), x.detach().half(), x.detach()[:0]):
        wide = norm.to(other.dtype)
        expected = functional.silu(functional.group_norm(other, norm.num_groups, wide.weight, wide.bias, norm.eps))
        assert torch.equal(group_norm(other, wide, silu=True), expected)


def test_a_second_derivative_is_refused():
    norm, x, _ = problem("a vector")
    y = group_norm(x, norm, silu=True)
    (first,) = torch.autograd.grad(y.float().square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("scale_shift", [False, True], ids=["default", "scale_shift"])
def test_only_norms_whose_result_is_activated_are_activated(scale_shift):
    model = UNet2DModel(**TINY_UNET | ({"resnet_time_scale_shift": "scale_shift"} if scale_shift else {}))
    found = [norm for module in model.modules() for norm in activated_norms(module)[0]]
    names = {name for name, module in model.named_modules() if any(module is norm for norm in found)}
    blocks = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm) and ".norm" in name and "resnets" in name}
    assert blocks
    assert names == {"conv_norm_out"} | (set() if scale_shift else blocks)


MODELS = {
    "unconditional": (UNet2DModel, TINY_UNET),
    "scale and shift": (UNet2DModel, TINY_UNET | {"resnet_time_scale_shift": "scale_shift"}),
}
MODELS |= {"text": (UNet2DConditionModel, TINY_CONDITION_UNET)}


def prediction(model, config):
    generator = torch.Generator().manual_seed(0)
    size = config["sample_size"]
    sample = torch.randn(2, config["in_channels"], size, size, generator=generator).to(next(model.parameters()).dtype)
    arguments = {}
    if "cross_attention_dim" in config:
        arguments["encoder_hidden_states"] = torch.randn(2, 3, config["cross_attention_dim"], generator=generator).to(sample.dtype)
    return model(sample.contiguous(memory_format=torch.channels_last), torch.tensor([10, 500]), **arguments).sample


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_did(name):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(**config).eval().requires_grad_(False)
    exact = prediction(model, config)
    use_cpp_norms(model)
    assert torch.equal(prediction(model, config), exact)  # in float32 nothing changes
    low = copy.deepcopy(model).bfloat16()
    apart = float((prediction(low, config).float() - exact).norm() / exact.norm())
    assert 0 < apart < 0.05
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.zero_()
    assert not bool(prediction(low, config).any())  # a copy has weights of its own
    assert torch.equal(prediction(model, config), exact)

"""Errors sown into the kernels of a training, one at a time: each must be found by the tests beside this one."""

import pytest

from tests.cpp_mutants import AS_IT_IS, not_once, passes

HOME = "calibration.training.cpp.library"
TESTS = {
    "fake_quant.h": "test_fake_quant.py",
    "group_norm.h": "test_group_norm.py",
    "group_stats.h": "test_group_norm.py",
    "kernels.cpp": "test_fake_quant.py",
}
# What goes wrong -> file, a text that it holds exactly once, what that becomes.
MUTANTS = {
    "NaN becomes a bound": ("fake_quant.h", "smaller(range.high, larger(range.low, position))", "smaller(larger(position, range.low), range.high)"),
    "the last values of a row are left out": ("fake_quant.h", "if (i < first + places) body", "if (false) body"),
    "the half step before a bound has no gradient": ("fake_quant.h", "range.high + 0.5f", "range.high + 0.0f"),
    "the scale's gradient leaves out the position": ("fake_quant.h", " - within * position", ""),
    "the lowest code's gradient is that within": ("fake_quant.h", "to_qmin + (g - within)", "to_qmin + within"),
    "only the first chunk is summed": ("fake_quant.h", "item < (row + 1) * chunks; item++) to_scale", "item < row * chunks + 1; item++) to_scale"),
    "the lowest code's gradient is not scaled": ("fake_quant.h", "to_qmin * p.scale[row]", "to_qmin"),
    "float32 is read as bfloat16": ("kernels.cpp", "p->type ? fake_quantize<Bf16>(*p, thread, team) : fake_quantize<float>", "true ? fake_quantize<Bf16>(*p, thread, team) : fake_quantize<float>"),
    "the last channels are left out": ("group_norm.h", "if (c < C) body", "if (false) body"),
    "a channel has the statistics of another group": ("group_norm.h", "c / (p.C / p.groups)", "c % p.groups"),
    "the bias is left out of the gradient's SiLU": ("group_norm.h", "z = fused(normed, gamma, beta), s", "z = normed * gamma, s"),
    "SiLU's gradient is the sigmoid": ("group_norm.h", "g = g * (s * (1.0f + z * (1.0f - s)));", "g = g * s;"),
    "the mean's share of the gradient is left out": ("group_norm.h", "g - values(first_term + c, count) - centred", "g - centred"),
    "the variance's share of the gradient is left out": ("group_norm.h", " - centred * values(second_term + c, count)", ""),
    "the weight is left out of a group's sum": ("group_norm.h", "of_gamma += (double)p.gamma[c] * grad_gamma[c]", "of_gamma += grad_gamma[c]"),
    "the gradient to SiLU is used for the norm": ("group_norm.h", "inner = p.silu ? out : grad", "inner = grad"),
    "a sample writes the statistics of the first": ("group_norm.h", "const int64_t place = (int64_t)n * p.groups + group;", "const int64_t place = group;"),
    "a group's variance leaves out its chunks' means": ("group_stats.h", " + step * step * count * pixels / (count + pixels)", ""),
}  # fmt: skip
IN_EVERY_RUN = ("the variance's share of the gradient is left out",)


def judges_of(file: str) -> str:
    return f"tests/calibration/training/cpp/{TESTS[file]}"


def test_every_sown_error_names_a_line_of_the_source():
    assert not_once(HOME, MUTANTS) == {}


@pytest.mark.extended
@pytest.mark.parametrize("file", ["fake_quant.h", "group_norm.h"])
def test_the_source_as_it_is_passes(file, tmp_path):
    assert passes(tmp_path, HOME, judges_of(file), AS_IT_IS, "not avx2")


@pytest.mark.parametrize("mutant", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.extended) for name in MUTANTS])
def test_an_error_sown_into_the_kernels_is_found(mutant, tmp_path):
    assert not passes(tmp_path, HOME, judges_of(MUTANTS[mutant][0]), MUTANTS[mutant], "not avx2"), f"nothing noticed that {mutant}"

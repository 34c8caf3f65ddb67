"""The kernels' own source on a CPU, against numpy."""

import numpy as np
import pytest

from engines.kernels.attention.launch import WIDTHS as TABLE
from tests.engines.kernels.emulator import Emulator
from tests.engines.kernels.emulator import attention_cases as drawn
from tests.engines.kernels.test_emulated import run_sanitized

CASES_EACH = [3, pytest.param(24, marks=pytest.mark.extended)]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator.built()


def test_the_widths_are_those_of_the_source():
    assert {width.elements: (width.queries, width.threads, width.shared_bytes) for width in TABLE} == drawn.WIDTHS


@pytest.mark.parametrize("cases", CASES_EACH)
@pytest.mark.parametrize("dtype", drawn.TYPES)
@pytest.mark.parametrize("width", drawn.WIDTHS)
def test_attention_of_random_shape_is_numpys(emulator, width, dtype, cases):
    """Codes, scales and powers of two bit for bit; other powers to the rounding of the type."""
    g = np.random.default_rng([width, *dtype.encode()])
    kinds = [drawn.Attention.drawn(g, width, dtype) for _ in range(cases)]
    for exact in (True, False):
        if not any(case.exact is exact for case in kinds):
            kinds.append(drawn.Attention(width=width, dtype=dtype, B=1, H=2, Lq=40, Lk=90, D=width - 8, exact=exact))
    for case in kinds:
        case.check(emulator)


@pytest.mark.parametrize("elements", [8, 40, 72, 96, 136])
def test_heads_narrower_than_the_kernel_are_padded_with_zeros(emulator, elements):
    width = next(width.elements for width in TABLE if elements <= width.elements)
    drawn.Attention(width=width, dtype="f16", B=1, H=3, Lq=70, Lk=130, D=elements, gap=8).check(emulator)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 129])
def test_the_last_stage_may_be_cut_anywhere(emulator, keys):
    drawn.Attention(width=64, dtype="f16", B=1, H=1, Lq=16, Lk=keys, D=64).check(emulator)


@pytest.mark.extended  # compiled with sanitizers, which takes ten seconds
def test_no_kernel_leaves_its_memory_or_does_what_is_undefined():
    """The last value of each operand is followed by a red zone: there are no tokens behind it here, and no gaps."""
    done = run_sanitized(
        "from tests.engines.kernels.emulator import attention_cases as drawn\n"
        "drawn.SPARE_TOKENS = 0\n"
        "for width in drawn.WIDTHS:\n"
        "    for exact in (True, False):\n"
        "        shape = {'B': 1, 'H': 2, 'Lq': 45, 'Lk': 75, 'D': width - 8}\n"
        "        drawn.Attention(width=width, dtype='f16', exact=exact, **shape).check(emulator)\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]

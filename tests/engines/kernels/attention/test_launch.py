"""The struct against a C++ compiler's own reading of params.h; names against the source; grids by hand."""

import pytest

from engines.kernels.attention.launch import WIDTHS, AttentionParams, attention_launches, chunk_of, entry_points, width_for
from tests.engines.kernels.test_launch import check_fields, check_memory, kernels_after_the_preprocessor


def test_the_struct_is_that_of_the_header(tmp_path):
    check_memory((AttentionParams,), tmp_path)
    check_fields((AttentionParams,))


def test_every_kernel_that_is_launched_is_in_the_source(tmp_path):
    assert kernels_after_the_preprocessor("attention.cu", tmp_path) == set(entry_points())


@pytest.mark.parametrize(("elements", "width"), [(8, 48), (40, 48), (56, 64), (64, 64), (72, 80), (96, 128), (136, 160)])
def test_a_head_takes_the_narrowest_kernel_that_it_fits(elements, width):
    assert width_for(elements).elements == width


def test_codes_are_padded_to_32_and_values_to_16():
    assert [(width.code_bytes, width.elements) for width in WIDTHS] == [(64, 48), (64, 64), (96, 80), (128, 128), (160, 160)]


def test_a_block_takes_a_chunk_of_keys_then_64_then_all_for_its_queries():
    """SD 1.5 at 64x64: 32 chunks of 128 keys, 64 blocks of codes, 32 blocks of 128 queries; for each head and sample."""
    params = AttentionParams(H=8, Lq=4000, Lk=4001, D=40, tokens=4032, chunk=126, chunks=32)
    sums, codes, attend = attention_launches(params, batch=2, type_name="bf16")
    assert (sums.entry, sums.grid, sums.threads) == ("attention_key_sums_bf16", (32, 8, 2), 256)
    assert (codes.entry, codes.grid, codes.threads) == ("attention_key_codes_bf16", (63, 8, 2), 256)
    assert (attend.entry, attend.grid, attend.threads, attend.shared_bytes) == ("attention_s8_48_bf16", (32, 8, 2), 256, 25088)
    assert {call.source for call in (sums, codes, attend)} == {"attention.cu"}


def test_there_are_never_more_than_32_chunks():
    assert [chunk_of(tokens) for tokens in (1, 77, 2048, 2049, 4096, 65536)] == [64, 64, 64, 65, 128, 2048]

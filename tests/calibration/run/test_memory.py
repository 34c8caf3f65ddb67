import torch

from calibration.run.memory import needed_memory, peak_memory


def test_the_peak_includes_freed_memory():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(64 << 20)  # 256 MiB, touched
    held = peak_memory(torch.device("cpu"))
    del block
    # Linux counts a thread's last few pages late, so two readings may differ by less than a megabyte.
    assert peak_memory(torch.device("cpu")) >= held - 2**20
    assert held >= before - 2**20
    assert held > 256 << 20


def test_the_estimate_counts_the_float_weights_once_and_the_codes():
    assert needed_memory(10**9, trains=False) == 6_500_000_000
    assert needed_memory(10**9, trains=False, low_memory=True) == 2_500_000_000
    assert needed_memory(10**9, trains=True) > 2 * needed_memory(10**9, trains=False)
    assert needed_memory(10**9, trains=False, cached=2**30) == 6_500_000_000 + 2**30
    assert needed_memory(10**9, trains=False, rotates=True) == 10_500_000_000

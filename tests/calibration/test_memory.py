import torch

from calibration.memory import peak_memory


def test_the_peak_remembers_what_was_freed():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(64 << 20)  # 256 MiB, touched
    held = peak_memory(torch.device("cpu"))
    del block
    assert peak_memory(torch.device("cpu")) >= held >= before
    assert held > 256 << 20

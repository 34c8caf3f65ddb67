from __future__ import annotations

import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy_tools.train_reference import Settings, Training, rate_factor

SMALL = Settings(size=8, channels=(8, 16), steps=4, batch=2)


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def training() -> Training:
    from diffusers import DDIMScheduler

    return Training(SMALL, DDIMScheduler(), torch.device("cpu"))


def test_a_resumed_run_is_identical_to_an_uninterrupted_one(images, tmp_path):
    straight, first, second = training(), training(), training()
    losses = [straight.step(number, images) for number in range(4)]
    for number in range(2):
        first.step(number, images)
    first.save(tmp_path / "state", 2)
    assert second.load(tmp_path / "state") == 2
    assert [second.step(number, images) for number in (2, 3)] == losses[2:]
    for a, b in zip(straight.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_rises_and_then_falls_to_zero():
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[0] == 0.5
    assert max(factors) == 1.0
    assert factors[-1] < 0.01


def test_a_size_between_the_levels_is_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        Settings(size=30)

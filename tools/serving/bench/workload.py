"""Mixed requests and the times at which they arrive."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from edm_deploy.serving.interface import ImageRequest, ModelCard

PROMPTS = ("a red bicycle", "a lighthouse in a storm, oil on canvas", "two cats", "a map of an island that does not exist")


def mixed_requests(card: ModelCard, count: int, seed: int, *, steps: tuple[int, int] = (10, 50)) -> list[ImageRequest]:
    """Requests of one image each, of random numbers of steps, schedulers, seeds, prompts and labels.

    Args:
        card: The model.
        count: Number of requests.
        seed: Of the random numbers.
        steps: Fewest and most steps, each number as likely as another.
    """
    chance = random.Random(seed)
    return [
        ImageRequest(
            id=f"{seed}-{number}",
            seed=chance.randrange(2**31),
            steps=chance.randint(*steps),
            scheduler=chance.choice(card.schedulers),
            prompt=chance.choice(PROMPTS) if card.takes_prompt else None,
            label=None if card.classes is None else chance.randrange(card.classes),
        )
        for number in range(count)
    ]


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Times in seconds, ascending, of a Poisson process, given that it has `count` arrivals at `rate` a second; the first one is at 0.

    Exponential gaps, scaled to their expected sum: with a hundred arrivals the rate of a draw would else differ from `rate` by ten percent.
    """
    chance = random.Random(seed)
    gaps = [chance.expovariate(1.0) for _ in range(count - 1)]
    scale = (count - 1) / rate / sum(gaps) if gaps else 0.0
    return [0.0, *(scale * passed for passed in accumulate(gaps))]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1_000_000) * len(ordered) // 1_000_000) - 1))]

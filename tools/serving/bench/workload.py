"""Mixed requests and the times at which they arrive."""

from __future__ import annotations

import random
from collections.abc import Sequence

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
    """Times in seconds, ascending, of a Poisson process of `rate` arrivals a second; the first one is at 0."""
    chance = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + chance.expovariate(rate))
    return times[:count]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1_000_000) * len(ordered) // 1_000_000) - 1))]

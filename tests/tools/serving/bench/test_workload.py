from __future__ import annotations

import asyncio
import itertools

import pytest

from edm_deploy_tools.serving.bench.workload import mixed_requests, poisson_arrivals, quantile


def test_requests_are_mixed_and_repeat_with_the_seed(replica):
    card = asyncio.run(replica.card())
    requests = mixed_requests(card, 200, 3)
    assert requests == mixed_requests(card, 200, 3)
    assert {request.steps for request in requests} == set(range(10, 51))
    assert {request.scheduler for request in requests} == set(card.schedulers)
    assert len({request.id for request in requests} | {request.id for request in mixed_requests(card, 200, 4)}) == 400
    for request in requests:
        replica.model.check(request)


def test_arrivals_have_exactly_their_rate_and_the_spread_of_a_poisson_process():
    times = poisson_arrivals(4000, 5.0, 0)
    gaps = [late - early for early, late in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2)
    assert poisson_arrivals(3, 5.0, 1)[-1] == pytest.approx(0.4)
    assert poisson_arrivals(1, 5.0, 1) == [0.0]
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)  # of an exponential distribution
    assert times[0] == 0


def test_a_quantile_is_one_of_the_values():
    values = list(range(1, 101))
    assert [quantile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert quantile([7.0], 0.5) == 7.0

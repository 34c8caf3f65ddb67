import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edm_deploy.serving.selection import AGEING, Candidate, order_of, select

CANDIDATES = st.lists(st.builds(Candidate, st.integers(0, 20), st.integers(1, 2), st.sampled_from("abc")), max_size=20)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CANDIDATES, st.integers(2, 8), st.dictionaries(st.sampled_from("abc"), st.integers(0, 30)))
def test_a_call_has_samples_of_one_key_that_fit_the_oldest_first(candidates, slots, waited):
    chosen = select(candidates, slots, waited)
    assert bool(chosen) == bool(candidates)
    assert len({candidates[index].key for index in chosen}) <= 1
    assert sum(candidates[index].rows for index in chosen) <= slots
    if chosen:
        group = [candidate for candidate in candidates if candidate.key == candidates[chosen[0]].key]
        assert min(group, key=lambda candidate: candidate.order).order == candidates[chosen[0]].order
        # No slot is empty that a sample of the group could use.
        left = slots - sum(candidates[index].rows for index in chosen)
        assert all(candidates.index(one) in chosen or one.rows > left for one in group if candidates.count(one) == 1)


def test_a_guided_sample_leaves_the_last_slot_to_one_of_one_row():
    candidates = [Candidate(0, 2, "a"), Candidate(1, 2, "a"), Candidate(2, 1, "a")]
    assert select(candidates, 3, {}) == [0, 2]


def test_a_fuller_group_goes_first_and_the_other_waits_a_few_calls():
    """One sample of another resolution against a batch that is always full."""
    candidates = [Candidate(5, 1, "rare"), *(Candidate(number, 1, "full") for number in range(4))]
    waited: dict[str, int] = {}
    keys = []
    while "rare" not in keys:
        keys.append(candidates[select(candidates, 4, waited)[0]].key)
        waited = {"rare": waited.get("rare", 0) + 1}
    assert 1 < len(keys) <= AGEING + 1


def test_no_group_starves_among_many():
    keys = "abcdefgh"
    candidates = [Candidate(number, 1, key) for number, key in enumerate("a" * 8 + keys[1:])]
    waited: dict[str, int] = {}
    seen = []
    for _ in range(60):
        key = candidates[select(candidates, 8, waited)[0]].key
        seen.append(key)
        waited = {other: waited.get(other, 0) + 1 for other in keys if other != key}
    for key in keys:
        places = [-1, *(at for at, each in enumerate(seen) if each == key), len(seen)]
        assert max(later - earlier for earlier, later in itertools.pairwise(places)) <= AGEING + 2 * len(keys)


def test_a_later_request_precedes_the_last_images_of_a_long_one():
    long, short = [order_of(0, image, 50) for image in range(10)], order_of(60, 0, 10)
    assert long[1] < short < long[2]

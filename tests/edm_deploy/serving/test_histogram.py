from edm_deploy.serving.histogram import BOUNDS, Counts, Histogram


def test_durations_are_counted_up_to_and_with_each_bound():
    histogram = Histogram()
    for seconds in (0.001, 0.0011, 300.0):
        histogram.add(seconds)
    counts = histogram.counts()
    assert counts.buckets[:2] == (1, 1) and counts.buckets[-1] == 1
    assert counts.count == 3
    assert abs(counts.mean - 300.0021 / 3) < 1e-9


def test_counts_of_replicas_are_added():
    one = Counts((1, *[0] * len(BOUNDS)), 0.5)
    assert (one + one).buckets[0] == 2
    assert (one + one).total == 1.0
    assert Counts().mean == 0.0

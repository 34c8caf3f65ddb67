from __future__ import annotations

import pytest

from edm_deploy.errors import InputError
from edm_deploy_tools.serving.bench.bench import IN_FLIGHT, UNPADDED, BenchSettings, bench_serving


def test_every_service_is_measured_at_every_load(chain):
    settings = BenchSettings(slots=2, requests=6, loads=(0.5, 0.9), steps=(1, 3), overhead_seconds=0)
    result = bench_serving(chain.engine, settings)
    others = {"static batch", "static batch, shrinking calls", "one at a time"}
    assert set(result.capacities) == set(result.loaded) == {IN_FLIGHT, UNPADDED, *others}
    for name, figures in result.loaded.items():
        assert [each.load for each in figures] == [0.5, 0.9]
        assert all(0 < each.p50 <= each.p95 <= each.p99 for each in figures)
        assert all(0 < each.occupancy <= 1 for each in figures), name
    assert result.overhead == {}
    assert result.to_json()["loaded"]["one at a time"][0]["requests"] == 6


@pytest.mark.extended
def test_the_overhead_has_the_engine_the_loop_and_the_server(chain):
    settings = BenchSettings(slots=2, requests=4, loads=(0.5,), steps=(2, 4), overhead_seconds=1)
    overhead = bench_serving(chain.engine, settings).overhead
    assert set(overhead) == {"bare", "loop", "server"}
    assert all(seconds > 0 for seconds in overhead.values())


@pytest.mark.parametrize(
    "wrong", [{"requests": 1}, {"rounds": 0}, {"loads": (0.0,)}, {"loads": (3.0,)}, {"steps": (5, 4)}, {"steps": (0, 4)}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=r"expected 1 <= FEWEST <= MOST|bench-serve needs"):
        BenchSettings(**wrong)

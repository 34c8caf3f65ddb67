from edm_deploy.serving.counters import Counters


def test_calls_and_endings_are_counted_and_an_idle_loop_has_no_occupied_slots():
    counters = Counters(slots=4)
    counters.add_call(3, 0.2, 0.1)
    counters.ended["finished"] += 1
    busy = counters.stats(requests=1, waiting=0, running=1, memory=10)
    assert (busy.calls, busy.rows, busy.occupied, busy.finished, busy.memory) == (1, 3, 3, 1, 10)
    assert busy.step_seconds.total == 0.2 and busy.engine_seconds.total == 0.1
    assert counters.stats(requests=0, waiting=0, running=0, memory=0).occupied == 0

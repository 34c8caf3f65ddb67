from __future__ import annotations

import json


def test_a_table_for_each_load_and_the_conditions_are_printed(run, chain):
    options = ("--slots", 2, "--requests", 4, "--load", 0.5, "--steps", "1:2", "--overhead-seconds", 0)
    ran = run("bench-serve", chain.engine, *options)
    assert ran.code == 0, ran.err
    assert "50% of the capacity of in-flight batching" in ran.out
    assert ran.out.count("one at a time") == 2
    assert "seed" in ran.out
    assert "p99" in json.dumps(json.loads(run("bench-serve", chain.engine, *options, "--json").out))


def test_what_cannot_be_measured_is_one_line(run, chain):
    assert "--steps some: expected FEWEST:MOST" in run("bench-serve", chain.engine, "--steps", "some").complaint
    assert "9 slots: the engine in" in run("bench-serve", chain.engine, "--slots", 9).complaint

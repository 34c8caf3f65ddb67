from __future__ import annotations


def test_engines_are_refused_where_a_fine_tuning_step_is_measured(run, chain):
    ran = run("bench", chain.engine, "--finetune-step", chain.model)
    assert ran.code == 2
    assert "--finetune-step" in ran.complaint


def test_a_bench_prints_medians_and_its_conditions(run, chain):
    ran = run("bench", chain.engine, "--batch", 2, "--rounds", 2)
    assert ran.code == 0, ran.err
    assert "Medians" in ran.out
    assert "torch" in ran.out

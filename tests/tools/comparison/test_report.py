from __future__ import annotations

import torch

from edm_deploy_tools.comparison.report import comparison_html, comparison_markdown, describe_conditions, ranked_rows, schemes_in


def cell(recipe, error, *, scheme="W4A4", seed=0, **more):
    figures = {"noise_error": error, "noise_error_by_step": [error, 2 * error], "psnr_db": 20 - error, "frechet": 0.5}
    figures |= {"weighted_error": error / 10, "weighted_error_by_step": [error / 10, 0.0], "psnr_db_by_seed": [20 - error]}
    figures |= {"psnr_interval": [19.5 - error, 20.3 - error]}
    figures |= {"seconds": 60.0, "peak_bytes": 1_000_000_000, "bytes": 4_000_000, "integer_share": 0.98, "int4_share": 0.5}
    identity = {"settings": {"rows": 2}, "passes": {}, "budget_seconds": 30.0}
    return (
        {"recipe": recipe, "scheme": scheme, "seed": seed, "trains": True, "folder": f"cells/{recipe}-{seed}", "identity": identity}
        | figures
        | more
    )


def results(*cells):
    settings = {"samples": 8, "steps": 2, "seeds": [123, 1]}
    return {
        "date": "2026-11-21T10:00:00",
        "machine": {"cpu": "a <cpu>", "cores": 2},
        "versions": {"torch": "2"},
        "model": {"name": "somewhere/model", "asked": "../my models/model"},
        "asked": {"rows": 2, "budget": 30.0, "seeds": 2, "recipes": "a,b", "bits": "W4A4", "presets": {"a": "demo"}, "setup": settings},
        "walk": {"scheduler": "ddim", "timesteps": [500.0, 0.0]},
        "frechet_floor": 0.25,
        "cells": list(cells),
    }


def test_recipes_are_ranked_by_psnr_and_seeds_are_one_row():
    rows = ranked_rows(results(cell("worse", 0.5), cell("better", 0.1), cell("better", 0.2, seed=1)), "W4A4")
    assert [(row["recipe"], round(row["noise_error"], 6), row["seeds"]) for row in rows] == [("better", 0.15, 2), ("worse", 0.5, 1)]
    assert [round(step, 6) for step in rows[0]["noise_error_by_step"]] == [0.15, 0.3]
    assert rows[0]["spread"] == [19.8, 19.9]


def test_the_rank_by_weighted_error_appears_where_it_is_another():
    rows = ranked_rows(results(cell("a", 1.0, weighted_error=0.2), cell("b", 2.0, weighted_error=0.1)), "W4A4")
    assert [(row["recipe"], row["weighted_rank"]) for row in rows] == [("a", 2), ("b", 1)]
    assert "| 0.2 (2) |" in comparison_markdown(results(cell("a", 1.0, weighted_error=0.2), cell("b", 2.0, weighted_error=0.1)))


def test_schemes_keep_their_order_and_are_ranked_separately():
    both = results(cell("a", 0.1, scheme="W8A8"), cell("b", 0.2, scheme="W8A8"), cell("a", 0.4), cell("b", 0.3))
    assert schemes_in(both) == ["W8A8", "W4A4"]
    text = comparison_markdown(both)
    assert text.index("| 1 | a |") < text.index("| 2 | b |") < text.index("| 1 | b |")


def test_the_markdown_has_the_spread_over_seeds_and_the_conditions():
    text = comparison_markdown(results(cell("a", 0.1), cell("a", 0.3, seed=1)))
    assert "| 19.8 ± 0.4 (19.7 to 19.9) | 0.02 (1) | 0.2000 |" in text
    assert "| 60 s | 1.0 GB | 4.0 MB | 98.0 % |" in text
    assert "`edm-deploy compare '../my models/model' --recipes a,b --bits W4A4" in text
    assert "16 samples in 2 steps of ddim from seeds 123, 1" in describe_conditions(results())
    assert "from different noise, is 0.25." in describe_conditions(results())
    assert "--preset a=demo" in text
    assert "somewhere" not in text  # a path of the machine that it was made on


def test_failed_experiments_are_last_with_their_reason():
    text = comparison_markdown(results(cell("broken", 0.0, failed="no <room>"), cell("a", 0.1)))
    assert text.index("| 1 | a |") < text.index("broken")
    assert "- broken at W4A4: no <room>" in text


def test_the_page_has_images_and_curves_and_escapes_texts():
    images = {"float": torch.zeros(2, 3, 4, 4), "cells/a-0": torch.ones(2, 3, 4, 4)}
    page = comparison_html(results(cell("a", 0.1), cell("b<c", 0.0, failed="no <room>")), images)
    assert page.count("data:image/png") == 2
    assert "<polyline" in page
    assert "b&lt;c at W4A4: no &lt;room&gt;" in page
    assert "a &lt;cpu&gt;" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_a_page_of_failures_alone_has_no_chart():
    assert "<polyline" not in comparison_html(results(cell("a", 0.0, failed="why")), {"float": torch.zeros(1, 3, 4, 4)})

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy_tools.roofline import app, layers_of, roofline, rooflines_of, site_rows, to_json, total_rows
from engines.performance.gpus import gpu_named
from tests.conftest import tiny_model
from tests.engines.rewritten import program_of


@pytest.fixture(scope="module")
def sd15():
    return rooflines_of("sd15", "rtx3090", "1,8")


def test_totals_are_the_sums_of_the_sites(sd15):
    for found in sd15:
        totals = {row["precision"]: row for row in total_rows(found)}
        rows = site_rows(found)
        assert totals["float16"]["layers ms"] == pytest.approx(sum(row["float16 us"] for row in rows) / 1e3, rel=1e-3)
        assert totals["INT8"]["layers ms"] == pytest.approx(sum(row["int8 us"] for row in rows) / 1e3, rel=1e-3)
        narrow = sum(row["int4 us"] or row["int8 us"] for row in rows)
        assert totals["INT4"]["layers ms"] == pytest.approx(narrow / 1e3, rel=1e-3)
        assert totals["INT4 where faster"]["layers ms"] <= totals["INT4"]["layers ms"]


def test_shares_of_the_bounds_sum_to_100(sd15):
    for row in total_rows(sd15[0]):
        assert sum(row[f"{bound} %"] for bound in ("tensor cores", "L2", "DRAM", "launch")) == pytest.approx(100, abs=0.3)


def test_the_slowest_sites_are_first(sd15):
    rows = site_rows(sd15[0])
    assert [row["int4 us"] or row["int8 us"] for row in rows[:3]] == sorted(
        (row["int4 us"] or row["int8 us"] for row in rows[:3]), reverse=True
    )
    assert rows[0]["bound by"] == "tensor cores"
    assert len(rows) == 282


def test_a_step_of_stable_diffusion_gains_from_4_bits_on_a_3090(sd15):
    """No measurement: what the tensor cores' peaks, 4 and 8 times float16's, leave of it after launches, memory and attention."""
    totals = {row["precision"]: row["over float16"] for row in total_rows(sd15[1])}
    assert 1.5 < totals["INT8"] < 4
    assert totals["INT8"] < totals["INT4"] < 8


def test_kept_sites_are_never_computed_in_4_bits(sd15):
    rows = {row["site"]: row for row in site_rows(sd15[0])}
    assert rows["conv_in"]["int4 us"] is None
    assert rows["conv_in"]["best"] == "int8"


def test_projections_that_share_an_input_share_its_quantization(sd15):
    times = sd15[0].sites
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert times[f"{block}.to_q"]["int8"].quantize_seconds > 0
    assert times[f"{block}.to_k"]["int8"].quantize_seconds == 0


def test_a_gpu_without_int4_runs_int8():
    (found,) = rooflines_of("sd15", "h200", "2")
    assert "INT8 throughout" in to_json(found)["advice"]
    assert "without INT4" in to_json(found)["GPU"]
    assert all(row["int4 us"] is None for row in site_rows(found))


def test_the_json_states_that_times_are_expected(sd15):
    content = json.loads(json.dumps(to_json(sd15[0])))
    assert content["expected"] is True
    assert content["note"].startswith("Expected, not measured")


def test_the_roofline_of_an_artifact_uses_its_codes(chain):
    layers = layers_of(str(chain.artifact))  # W8A8
    assert not layers.four_bit
    (found,) = rooflines_of(str(chain.artifact), "rtx3090", "4")
    assert "no site has 4-bit codes" in to_json(found)["advice"]


def test_a_branch_is_expected_to_take_the_time_of_two_thin_products(sd15):
    found = sd15[0]
    name = next(name for name, site in found.layers.work.sites.items() if site.taps == 9)
    thin = {part: replace(found.layers.work.sites[name], outputs=32) for part in ("a.branch.down", "a.branch.up")}
    branched = roofline(replace(found.layers, work=replace(found.layers.work, branches=thin)), found.gpu, found.batch)
    assert 2e-6 < branched.outside - found.outside < 1e-3


def test_a_fused_quantization_is_never_slower():
    (separate,), (fused,) = rooflines_of("sd15", "rtx4090", "2"), rooflines_of("sd15", "rtx4090", "2", fused=True)
    assert all(fused.sites[name]["int8"].seconds <= separate.sites[name]["int8"].seconds for name in fused.sites)


@pytest.mark.parametrize("batch", ["0", "1,x", ""])
def test_a_batch_that_is_not_a_number_is_refused(batch):
    with pytest.raises(InputError, match="--batch"):
        rooflines_of("sd15", "rtx3090", batch)


def test_a_gpu_without_figures_is_refused_with_those_that_have_them():
    with pytest.raises(UnsupportedError, match="Known: rtx3090"):
        rooflines_of("sd15", "rtx2080", "1")


def test_an_engine_is_refused(chain):
    with pytest.raises(InputError, match="engine directory; expected a model"):
        rooflines_of(str(chain.engine), "rtx3090", "1")


def test_the_command_prints_a_table_for_each_batch(capfd, chain):
    from edm_deploy_tools.common import run_app

    assert run_app.run(app, "roofline", [str(chain.model), "--gpu", "a100", "--batch", "1,4", "--top", "3"]) == 0
    printed = capfd.readouterr().out
    assert f"Expected step on {gpu_named('a100').title}, batch 4" in printed
    assert "The 3 slowest of" in printed
    assert run_app.run(app, "roofline", [str(chain.model), "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["rooflines"]) == 2


def test_inspect_adds_expected_times(run, chain):
    ran = run("inspect", chain.model, "--gpu", "rtx3090", "--batch", "2")
    assert ran.code == 0
    assert "Expected step on GeForce RTX 3090, batch 2" in ran.out
    content = json.loads(run("inspect", chain.artifact, "--gpu", "rtx3090", "--json").out)
    assert {"kind", "facts", "tables", "rooflines"} <= set(content)


def test_the_command_counts_every_kernel_of_a_step(capfd, chain, monkeypatch):
    from edm_deploy_tools.benchmarks.traced_step import TracedModel
    from edm_deploy_tools.common import run_app

    family, config, _ = tiny_model("unet2d")
    tiny = TracedModel(family=family, config=config, program=program_of("unet2d"))
    monkeypatch.setattr(TracedModel, "of", lambda family, config: tiny)
    assert run_app.run(app, "roofline", [str(chain.model), "--batch", "1,64", "--step", "--json"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert "Expected, not measured" in content["note"]
    one, many = content["steps"]["1"], content["steps"]["64"]
    assert [row["graph"] for row in one] == [row["graph"] for row in many]
    assert all(more["step ms"] >= less["step ms"] > 0 for less, more in zip(one, many, strict=True))
    assert run_app.run(app, "roofline", [str(chain.engine), "--step"]) == 2
    assert "--step" in capfd.readouterr().err
    assert run_app.run(app, "roofline", [str(chain.model), "--branch-rank", "8"]) == 2
    assert "--branch-rank is counted in whole steps. Add --step" in capfd.readouterr().err

from __future__ import annotations

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.describe import describe, kind_of, longest


def test_each_kind_is_told_by_the_file_that_marks_it(chain):
    for kind in ("model", "artifact", "onnx", "engine"):
        assert kind_of(str(getattr(chain, kind))) == kind
        assert describe(str(getattr(chain, kind))).kind == kind


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is no model, artifact, ONNX directory or engine"):
        kind_of(str(tmp_path))


def test_shares_of_the_work_sum_to_all_of_it(chain):
    rows = describe(str(chain.model)).tables["Sites"]
    assert sum(row["MACs %"] for row in rows) == pytest.approx(100, abs=0.5)  # each is rounded to 0.01
    assert {row["placement"] for row in rows} == {"quantize", "keep8"}


def test_an_artifact_is_described_with_a_plan_for_every_backend(chain):
    description = describe(str(chain.artifact))
    assert {row["backend"] for row in description.tables["Plan"]} >= {"ort", "openvino", "trt-rtx", "trt"}
    assert description.facts["recipe"] == "minmax"


def test_an_engine_is_described_with_profile_and_plan(chain):
    facts = describe(str(chain.engine)).facts
    assert facts["backend"] == "ort"
    assert "batch 1:4:8" in facts["profile"]
    assert "stored W8A8" in facts["plan"]


def test_of_many_sites_those_with_the_most_work_are_printed_in_the_models_order():
    rows = [{"site": name, "MACs %": share} for name, share in (("a", 30.0), ("b", 10.0), ("c", 60.0))]
    title, kept = longest("Sites", rows, 2)
    assert [row["site"] for row in kept] == ["a", "c"]
    assert title == "Sites: the 2 with the most work of 3; --json has all"
    assert longest("Sites", rows, 3) == ("Sites", rows)

from __future__ import annotations

import json

import pytest

from edm_deploy.errors import ArtifactError
from edm_deploy_tools.generation import image_set
from edm_deploy_tools.generation.image_set import opened
from edm_deploy_tools.generation.plan import plan_of
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest


def test_the_description_of_another_version_is_refused(chain, tmp_path):
    (tmp_path / "images.json").write_text(json.dumps({"schema": 99, "kind": "images", "settings": {}}))
    with (
        pytest.raises(ArtifactError, match="is not one that this version wrote"),
        opened(plan_of(chain.engine, GenerationRequest()), tmp_path),
    ):
        pass


def test_the_lock_of_a_killed_run_is_taken_over_and_none_stays(chain, tmp_path):
    (tmp_path / image_set.LOCK).write_bytes(b"")  # a lock ends with its process; the file stays
    plan = plan_of(chain.engine, GenerationRequest(num_images=3), shard_images=2)
    with opened(plan, tmp_path) as images:
        assert len(images.missing) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["images.json"]
    content = json.loads((tmp_path / "images.json").read_text())
    assert (content["complete"], content["shards"], content["num_images"]) == (False, {}, 3)


def test_other_versions_of_packages_are_a_note(chain, tmp_path, capfd, monkeypatch):
    plan = plan_of(chain.engine, GenerationRequest(num_images=1))
    with opened(plan, tmp_path):
        pass
    notes = []
    monkeypatch.setattr(image_set.log, "warning", lambda text, *values: notes.append(text % values))
    monkeypatch.setattr(image_set, "versions", lambda: {"torch": "9"})
    with opened(plan, tmp_path):
        pass
    assert len(notes) == 1
    assert "was begun with other versions of packages" in notes[0]

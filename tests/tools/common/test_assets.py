from __future__ import annotations

from edm_deploy_tools.common.assets import ASSETS, REFERENCE_MODEL


def test_the_shipped_model_is_there():
    assert (REFERENCE_MODEL / "model_index.json").is_file()


def test_the_other_assets_are_there():
    assert {"architectures", "features-cifar10", "prompts"} <= {path.name for path in ASSETS.iterdir()}

import pytest

from edm_deploy.runtime.capabilities import capabilities_of
from edm_deploy_tools.inspection.executed_work import layer_macs, share_words, work_shares
from tests.conftest import artifact_by_hand


def test_macs_are_counted_by_layer():
    macs = layer_macs(artifact_by_hand())
    assert macs["conv_in"] == 8 * 8 * 8 * 3 * 9  # 8x8 pixels, 8 filters of 3x3x3


def test_shares_add_up_and_follow_the_backend():
    artifact = artifact_by_hand()
    on_cuda, elsewhere = (work_shares(artifact, capabilities_of(name)) for name in ("cuda", "ort"))
    assert sum(on_cuda.values()) == pytest.approx(1.0)
    assert elsewhere == pytest.approx({"int8": 1.0})
    macs = layer_macs(artifact)
    eight = sum(count for name, count in macs.items() if artifact.family_object.placement(name) == "w8a8")
    assert on_cuda["int8"] == pytest.approx(eight / sum(macs.values()))
    assert share_words({"int4": 0.8125, "float": 0.1875}) == "INT4 81.2 %, float 18.8 %"

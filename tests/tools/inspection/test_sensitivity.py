import pytest

from calibration.observers.sensitivity import Sensitivity
from edm_deploy.network.layer_costs import SiteWork
from edm_deploy_tools.inspection.describe import Description
from edm_deploy_tools.inspection.sensitivity import sensitivity_rows
from tests.conftest import tiny_model

Q, K, CONV = "down_blocks.1.attentions.0.to_q", "down_blocks.1.attentions.0.to_k", "mid_block.resnets.0.conv1"


def site(channels):
    return SiteWork(channels=channels, taps=1, outputs=1, inputs_at=1, outputs_at=1)


def test_the_sites_of_most_gain_for_their_work_come_first():
    inputs = [Sensitivity(sites=(CONV,), error=2.0, raised_error=1.9), Sensitivity(sites=(Q, K), error=2.0, raised_error=2.1)]
    both = [Sensitivity(sites=(CONV,), error=2.0, raised_error=1.5), Sensitivity(sites=(Q, K), error=2.0, raised_error=1.6)]
    first, second = sensitivity_rows(inputs, both, tiny_model("unet2d")[0], {CONV: site(50), Q: site(15), K: site(10), "other": site(25)})
    assert first == {
        "sites": f"{Q} and 1 that share its input",
        "group": "attention",
        "MACs %": 25.0,
        "W4A8 gains %": -5.0,
        "W8A8 gains %": 20.0,
        "a percent of MACs": 0.8,
    }
    assert (second["sites"], second["group"], second["W4A8 gains %"], second["a percent of MACs"]) == (CONV, "convolution", 5.0, 0.5)


def test_only_a_model_can_be_measured():
    from edm_deploy.errors import InputError
    from edm_deploy_tools.inspection.sensitivity import with_sensitivity

    with pytest.raises(InputError, match="--sensitivity measures a float model, and a is an engine"):
        with_sensitivity(Description(kind="engine", facts={}), "a")


@pytest.mark.extended
def test_inspect_prints_the_table_of_a_model(run, chain):
    import json

    ran = run("inspect", chain.model, "--sensitivity", "--json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["tables"]["Sensitivity"]
    gains = [row["a percent of MACs"] for row in rows]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0
    assert {row["group"] for row in rows} >= {"convolution", "time_embedding"}

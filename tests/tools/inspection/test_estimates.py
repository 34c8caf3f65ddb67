from __future__ import annotations

import pytest

from edm_deploy.artifact.artifact import TENSORS_NAME, Artifact
from edm_deploy.errors import UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.meta_model import meta_model
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.runtime.capabilities import CAPABILITIES
from edm_deploy_tools.inspection.estimates import Scheme, artifact_bytes, branch_rows, by_site, engine_bytes, planned, shares
from tests.conftest import TINY_UNET

FAMILY = family_named("unet2d")
LAYERS = FAMILY.sites(meta_model(FAMILY, TINY_UNET))


@pytest.fixture(scope="module")
def work():
    return model_work(FAMILY, TINY_UNET)


def test_shares_sum_to_all_of_it(work):
    rows = shares(FAMILY, work)
    assert sum(row["MACs %"] for row in rows) == pytest.approx(100, abs=0.05)
    assert sum(row["weights %"] for row in rows) == pytest.approx(100, abs=0.05)
    assert sum(row["sites"] for row in rows) == len(work.sites)
    assert sum(by_site(work.sites).values()) == pytest.approx(100, abs=0.5)  # each is rounded to 0.01


def test_branches_are_listed_with_their_work_and_why_they_are_float(work):
    layer = "down_blocks.1.resnets.0.conv2"
    branched = model_work(FAMILY, TINY_UNET, NetworkRewrite(branches={layer: 4}))
    (row,) = branch_rows(FAMILY, branched)
    # 4 of 16 outputs of the 3x3 convolution of 16 channels, and 4 * 16 for its 9 * 16 * 16.
    assert row["site"] == f"{layer}.base" and row["rank"] == 4 and row["MACs % of its layer"] == pytest.approx(25 + 2.78, abs=0.01)
    assert "low-rank branch" in row["in floating point"]
    assert not branch_rows(FAMILY, work) and list(branched.branches) == [f"{layer}.branch.down", f"{layer}.branch.up"]
    assert sum(row["MACs %"] for row in shares(FAMILY, branched)) < 100, "the rest is the branch"


def test_the_expected_artifact_is_as_large_as_the_real_one(chain):
    """The chain's artifact is W8A8 with 4 rows. Its floats are float32 but for those that are exact in float16, and a header names each tensor."""
    artifact = Artifact.load(chain.artifact)
    work = model_work(artifact.family_object, artifact.config)
    least, most = (
        artifact_bytes(artifact.family_object, work, Scheme(8, 8), rest_bytes=size, rows=len(artifact.timesteps)) for size in (2, 4)
    )
    data = (chain.artifact / TENSORS_NAME).read_bytes()
    found = len(data) - 8 - int.from_bytes(data[:8], "little")
    index = 4 * (len(artifact.timesteps) + artifact.num_train_timesteps)  # timesteps and row_of_timestep
    assert least <= found - index <= most


def test_four_bits_take_half_of_eight_in_the_quantized_sites(work):
    quantized = sum(site.weights for name, site in work.sites.items() if FAMILY.placement(name) == "quantize")
    saved = artifact_bytes(FAMILY, work, Scheme(8, 8)) - artifact_bytes(FAMILY, work, Scheme(4, 8))
    assert saved == pytest.approx(quantized / 2, abs=len(work.sites))


def test_plans_are_those_that_an_artifact_would_get(work):
    cuda = planned(FAMILY, LAYERS, Scheme(4, 4), CAPABILITIES["cuda"])
    assert cuda["conv_in"].executed == "int8"  # kept at W8A8
    assert {plan.executed for name, plan in cuda.items() if FAMILY.placement(name) == "quantize"} == {"int4"}
    assert {plan.executed for plan in planned(FAMILY, LAYERS, Scheme(4, 8), CAPABILITIES["cuda"]).values()} == {"int8"}
    assert planned(FAMILY, LAYERS, Scheme(8, 8), CAPABILITIES["ort"])["conv_in"].executed == "float"


def test_an_engine_that_reads_packed_codes_is_smaller(work):
    def size(backend: str) -> int:
        plans = planned(FAMILY, LAYERS, Scheme(4, 4), CAPABILITIES[backend])
        return engine_bytes(FAMILY, work, Scheme(4, 4), CAPABILITIES[backend], plans)

    assert size("cpu") == size("cuda") < size("trt-rtx")


def test_a_scheme_that_a_backend_refuses_has_no_plan():
    with pytest.raises(UnsupportedError, match="Nearest"):
        planned(FAMILY, LAYERS, Scheme(4, 16), CAPABILITIES["trt-rtx"])

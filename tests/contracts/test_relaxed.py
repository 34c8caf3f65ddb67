"""Relaxed timesteps of 8 bits on every backend that runs on this machine: a second engine of the same codes, whose inputs are 8-bit integers."""

from dataclasses import replace

import pytest

import engines
from edm_deploy.artifact.timestep_routing import mask_from_intervals
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.inspection.describe import describe
from tests.conftest import artifact_by_hand, tiny_inputs, tiny_model
from tests.contracts.test_backends import RUNS_HERE
from tests.contracts.test_sessions import OPTIONS


@pytest.fixture(scope="module")
def relaxed(tmp_path_factory):
    """8-bit weights, and 4-bit inputs at timesteps below 500: where the inputs have 8 bits the network is far nearer to the float model."""
    narrow, wide = artifact_by_hand(weight_bits=8, act_bits=4), artifact_by_hand(weight_bits=8, act_bits=8)
    sites = {
        name: replace(site, relaxed_activation=wide.sites[name].activation if site.activation.bits < 8 else None)
        for name, site in narrow.sites.items()
    }
    artifact = replace(narrow, sites=sites, relaxed=mask_from_intervals([(500, 999)], 1000))
    path = tmp_path_factory.mktemp("relaxed")
    artifact.save(path / "artifact")
    onnx_from_artifact(artifact, path / "onnx")
    return artifact, path


@pytest.mark.parametrize("name", [name if name in ("ort", "cpu") else pytest.param(name, marks=pytest.mark.extended) for name in RUNS_HERE])
def test_samples_at_relaxed_timesteps_are_computed_by_a_second_engine_of_8_bit_inputs(name, relaxed, tmp_path):
    _, path = relaxed
    source = path / engines.backend_named(name).builds_from
    engines.build_engine(source, tmp_path / "engine", backend=name, options=OPTIONS[name])
    inputs = tiny_inputs("unet2d", batch=4)  # timesteps 0, 333, 666, 999: two of each engine
    family, _, model = tiny_model("unet2d")
    exact = family.forward(model, inputs)
    with load_denoiser(tmp_path / "engine", device="cpu") as denoiser:
        found = denoiser(**inputs).sample
    narrow, wide = (
        (part.double() - exact[rows].double()).square().sum() for rows, part in ((slice(2), found[:2]), (slice(2, 4), found[2:]))
    )
    assert float(wide) < 0.2 * float(narrow)
    assert describe(str(tmp_path / "engine")).facts["relaxed"].startswith("timesteps 500 to 999: inputs of 8 bits")
    second = Manifest.read(tmp_path / "engine" / "relaxed", kind="engine")
    assert {site.scheme for site in second.sites.values()} == {"W8A8"}
    assert {plan.executed for plan in second.plan.values()} <= {
        "int8",
        "float",
    }  # no weight-only site: ONNX Runtime's convolutions are float


def test_a_backend_that_builds_from_the_artifact_gets_the_second_graph(relaxed):
    artifact, path = relaxed
    content, manifest = engines.backend_named("cuda").relaxed(path / "artifact", artifact)
    assert {site.scheme for site in content.sites.values()} == {"W8A8"}
    assert manifest.relaxed == ()

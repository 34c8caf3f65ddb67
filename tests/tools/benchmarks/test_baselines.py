import importlib.util
from contextlib import ExitStack

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy_tools.benchmarks.baselines import NNCF, Baselines, random_model
from edm_deploy_tools.benchmarks.engines import bench_engines, config_at_profile, inputs_of

has_nncf = importlib.util.find_spec("nncf") is not None


@pytest.fixture
def manifest(chain):
    return Manifest.read(chain.engine, kind="engine")


def test_torchs_baselines_compute_the_float_model(manifest):
    family, config = family_named(manifest.family), manifest.config
    inputs = inputs_of(family, config, manifest.num_train_timesteps, 2)
    with ExitStack() as scratch:
        baselines = Baselines(manifest=manifest, config=config, inputs=inputs, threads=None, scratch=scratch)
        calls = baselines.calls(("torch-bf16", "torch"))
    assert list(calls) == ["torch-bf16", "torch"]
    exact = family.forward(random_model(family, config), inputs)
    assert torch.equal(calls["torch"](), exact)
    assert calls["torch-bf16"]().dtype == torch.bfloat16


def test_engines_are_measured_at_the_usual_size_of_their_profile(manifest):
    height, width = family_named(manifest.family).sample_size(manifest.config)
    assert config_at_profile(manifest) == manifest.config
    manifest.profile.update(height=ShapeRange(height, 2 * height, 2 * height), width=ShapeRange(width, width, width))
    config = config_at_profile(manifest)
    assert family_named(manifest.family).sample_size(config) == (2 * height, width)


@pytest.mark.skipif(has_nncf, reason="nncf is installed")
def test_without_nncf_its_baseline_is_refused_with_the_remedy(chain):
    pytest.importorskip("openvino", reason="nncf's baseline runs in openvino")
    with pytest.raises(UnsupportedError, match=r"pip install nncf, or leave nncf-int8 out of --against"):
        bench_engines([chain.engine], against=[NNCF], batch=2, rounds=1)


@pytest.mark.skipif(not has_nncf, reason="needs nncf, which is not a dependency")
def test_nncfs_int8_of_the_float_model_is_timed(chain):
    bench = bench_engines([chain.engine], against=["openvino-bf16", NNCF], batch=2, rounds=1)
    assert [timing.name for timing in bench.timings] == ["openvino-bf16", NNCF, "engine"]

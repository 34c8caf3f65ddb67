from __future__ import annotations

import torch

from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.benchmarks.baselines import random_model
from edm_deploy_tools.benchmarks.engines import inputs_of
from edm_deploy_tools.benchmarks.float_engine import build_float_engine, float_graph


def test_the_float_engine_computes_what_the_float_model_computes(chain, tmp_path):
    manifest = Manifest.read(chain.engine, kind="engine")
    denoiser = load_denoiser(chain.engine)
    model = random_model(denoiser.family, manifest.config)
    inputs = inputs_of(denoiser.family, manifest.config, 1000, 2)
    float_graph(manifest, manifest.config, model, tmp_path / "onnx")
    build_float_engine(tmp_path / "onnx", tmp_path / "engine", backend="ort", precision="fp32", threads=None, batch=2)
    found = load_denoiser(tmp_path / "engine")(**inputs).sample
    # Float32 sums in another order, through some twenty layers.
    torch.testing.assert_close(found, denoiser.family.forward(model, inputs), rtol=1e-3, atol=1e-4)

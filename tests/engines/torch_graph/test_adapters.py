"""Adapter branches in the torch graph. Their arithmetic is compared site by site in `tests/contracts/test_adapters.py`."""

import pytest
import torch

from edm_deploy import load_denoiser
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest
from engines import build_engine
from tests.conftest import tiny_inputs
from tests.tiny_loras import peft_tensors


@pytest.fixture(scope="module")
def saved(artifact_w4a4, tmp_path_factory):
    return artifact_w4a4.save(tmp_path_factory.mktemp("cuda") / "artifact")


def test_a_branch_enters_the_epilogue_of_its_site_with_all_fusions(saved, tmp_path):
    """Ranks are rounded up to those that the kernels have; fused and unfused graphs differ in roundings alone."""
    from engines import cuda
    from engines.torch_graph.fusions.epilogues import PLACES
    from engines.torch_graph.rewrite import PRODUCTS

    build_engine(saved, tmp_path / "engine", backend="cuda", options=BuildOptions(gpu="sm_86", lora_rank=2, lora_layers="."))
    manifest = Manifest.read(tmp_path / "engine", kind="engine")
    assert manifest.adapters.rank == 8
    tensors = cuda.load_tensors(tmp_path / "engine" / cuda.ENGINE_NAME)
    kinds = {name: plan.codes for name, plan in manifest.plan.items()}
    rewritten, placeholders = cuda.fused_graph(manifest, tensors, kinds)
    assert list(placeholders) == [declared.name for declared in manifest.adapters.inputs]
    products = [node for node in rewritten.graph.nodes if node.target in PRODUCTS]
    assert len(products) == len(manifest.sites)
    assert all(node.args[PLACES["low"]] is not None for node in products)
    with load_denoiser(tmp_path / "engine", device="cpu") as denoiser:
        inputs = tiny_inputs("unet2d")
        before = denoiser.run(inputs)
        denoiser.load_lora(peft_tensors(manifest.adapters.layers, rank=2))
        assert not torch.equal(denoiser.run(inputs), before)


def test_options_without_each_other_or_for_another_backend_are_refused(saved, onnx_w4a4, tmp_path):
    with pytest.raises(InputError, match="--lora-layers names the layers of --lora-rank"):
        build_engine(saved, tmp_path / "e", backend="cuda", options=BuildOptions(gpu="sm_86", lora_layers="."))
    with pytest.raises(InputError, match="--lora-rank 0: expected 1 to 1024"):
        build_engine(saved, tmp_path / "e", backend="cuda", options=BuildOptions(gpu="sm_86", lora_rank=0))
    with pytest.raises(
        UnsupportedError, match=r"ort builds from a graph, which has the adapter branches\. Give --lora-rank to edm-deploy export"
    ):
        build_engine(onnx_w4a4, tmp_path / "e", backend="ort", options=BuildOptions(lora_rank=4))

"""What holds for the adapter branches of every backend that runs here: exact at every site, by sample, and removed without a trace."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import engines
from edm_deploy.adapters.read_lora import LoraTarget, read_lora
from edm_deploy.adapters.site_weights import BranchTarget, adapters_of, site_factors
from edm_deploy.adapters.slots import LoadedAdapter, packed
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.adapter_inputs import SLOT_SCALES, AdapterInputs
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import load_denoiser
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs
from tests.conftest import artifact_by_hand, tiny_inputs, tiny_model
from tests.contracts.test_backends import RUNS_HERE, engine_of
from tests.tiny_loras import peft_tensors

RANK = 6  # slots; the adapters below take four and two of them


@dataclass(frozen=True)
class Subject:
    """An artifact with a branch at every layer, and its engines."""

    artifact: Artifact
    adapters: AdapterInputs
    inputs: dict
    folder: Path

    def opened(self, backend):
        path = self.folder / backend
        if not path.is_dir():
            source = engines.backend_named(backend).builds_from
            slots = {"precision": "fp16", "lora_rank": RANK, "lora_layers": "."} if source == "artifact" else {}
            options = BuildOptions(gpu="sm_86" if backend == "cuda" else None, **slots)
            engines.build_engine(self.folder / source, path, backend=backend, options=options)
        return load_denoiser(path, device="cpu")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    artifact, folder = artifact_by_hand("unet2d"), tmp_path_factory.mktemp("adapters")
    adapters = adapters_of(artifact, rank=RANK, pattern=".")
    onnx_from_artifact(artifact, folder / "onnx", adapters=adapters)
    artifact.save(folder / "artifact")
    return Subject(artifact, adapters, tiny_inputs("unet2d", batch=4), folder)


@pytest.fixture(scope="module", params=RUNS_HERE)
def denoiser(request, subject):
    with subject.opened(request.param) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _nothing_stays_loaded(request):
    yield
    if "denoiser" in request.fixturenames:
        request.getfixturevalue("denoiser").unload_lora()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.extended] if name == "openvino" else []) for name in RUNS_HERE])
def test_at_every_site_the_branch_is_that_of_the_reference(name, subject):
    generator = torch.Generator().manual_seed(0)
    values = {
        declared.name: torch.randn([4 if dim == "batch" else dim for dim in declared.dims], generator=generator) / 4
        for declared in subject.adapters.inputs
    }
    backend = engines.backend_named(name)
    engine = replace(engine_of(subject.artifact, backend, subject.folder), adapters=subject.adapters)
    dtype = backend.site_dtype(engine)
    values = {key: value.to(dtype).float() for key, value in values.items()}
    cut = cut_from_inputs(
        subject.artifact, subject.inputs, subject.folder / f"cut-{dtype}", dtype=dtype, adapters=subject.adapters, adapter_values=values
    )
    sites = agreement(cut, engine, device="cpu")
    assert {site.site for site in sites} == set(subject.artifact.sites) == set(subject.adapters.layers)
    assert [site.site for site in sites if site.ties or site.differ] == []
    # In float16 a branch is rounded after each of its three products, the site before the sum, and the sum.
    rounding = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert max(site.output_error for site in sites) <= rounding
    without = cut_from_inputs(subject.artifact, subject.inputs, subject.folder / "without", dtype=torch.float32)
    assert all((cut.records[site].y - without.records[site].y).abs().max() > 0 for site in subject.adapters.layers)


def test_each_sample_has_its_own_adapters(denoiser, subject):
    before = denoiser.run(subject.inputs)
    denoiser.load_lora(peft_tensors(subject.adapters.layers, rank=4, seed=1), name="one")
    one = denoiser.run(subject.inputs)
    denoiser.load_lora(peft_tensors(subject.adapters.layers, rank=2, seed=2), name="two")
    denoiser.set_adapters("two")
    two = denoiser.run(subject.inputs)
    denoiser.set_adapters(["one", "two"], [[0.0, 1.0, 0.0, 1.0], torch.tensor([0.0, 0.0, 1.0, 1.0])])
    mixed, state = denoiser.run(subject.inputs), denoiser._state()
    # Bit for bit: a row of a product does not depend on the other rows, and an adapter that is off adds zeros.
    assert [torch.equal(mixed[at], rows[at]) for at, rows in enumerate((before, one, two))] == [True] * 3
    assert not any(torch.equal(mixed[3], rows[3]) for rows in (before, one, two))
    weights = {name: value.float() for name, value in state.weights.items()}
    reference = Reference(subject.artifact, weights)
    rank = next(len(value) for name, value in weights.items() if name.endswith(".down"))  # cuda rounds it up
    expected = reference(subject.inputs | {SLOT_SCALES: state.scales(4, rank)})
    plain = Reference(subject.artifact)(subject.inputs)
    # Codes flip at ties, more of them in float16: as far from the reference with adapters as without them, give or take a half.
    assert (mixed - expected).norm() <= 1.5 * (before - plain).norm() + 1e-5 * expected.norm()


def test_without_adapters_it_computes_what_it_did_before(denoiser, subject):
    before = denoiser.run(subject.inputs)
    name = denoiser.load_lora(peft_tensors(subject.adapters.layers, rank=4, seed=1), weight=0.5)
    assert not torch.equal(denoiser.run(subject.inputs), before)
    denoiser.set_adapters(name, 0.0)
    assert torch.equal(denoiser.run(subject.inputs), before)
    denoiser.unload_lora(name)
    assert torch.equal(denoiser.run(subject.inputs), before)
    assert denoiser.peft_config == {}


@pytest.mark.extended
def test_a_builder_without_gpu_takes_the_branches(subject):
    pytest.importorskip("tensorrt_rtx")
    manifest = engines.build_engine(
        subject.folder / "onnx", subject.folder / "trt-rtx", backend="trt-rtx", options=BuildOptions(gpu="sm_86")
    )
    assert manifest.adapters == subject.adapters
    assert manifest.build["sites_in_integer_layers"] == len(subject.artifact.sites)


def peft_model(kind, tensors, rank):
    """The float model with a LoRA, as PEFT computes it."""
    peft = pytest.importorskip("peft", reason="PEFT on the float model is the judge")
    _, _, model = tiny_model(kind)
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=False), model, "x")
    assert not peft.set_peft_model_state_dict(model, tensors, "x").unexpected_keys
    return model.eval()


@pytest.mark.parametrize("kind", ["unet2d", "unet2d-condition", "sd3", "flux"])
def test_a_lora_costs_no_accuracy(kind):
    """With a LoRA, no further from PEFT on the float model than without from the float model, within a tenth. The LoRA changes predictions by 2 to 16 %."""
    rank, inputs, artifact = 4, tiny_inputs(kind), artifact_by_hand(kind)
    family, config, model = tiny_model(kind)
    adapters = adapters_of(artifact, rank=rank)
    tensors = peft_tensors(adapters.layers, rank=rank, strength=0.1)
    with torch.no_grad():
        exact, exact_with = family.forward(model, inputs), family.forward(peft_model(kind, tensors, rank), inputs)
    target = BranchTarget(adapters, artifact.structure, site_factors(artifact, adapters))
    sites = target.site_weights(read_lora(tensors, LoraTarget(family, config, rank)))
    weights = packed([LoadedAdapter("x", rank, sites, torch.ones(1))], adapters, torch.float32, torch.device("cpu"))
    found = Reference(artifact)(inputs)
    found_with = Reference(artifact, weights)(inputs | {SLOT_SCALES: torch.ones(len(exact), rank)})
    assert (exact_with - exact).norm() > 0.01 * exact.norm()
    assert (found_with - exact_with).norm() <= 1.1 * (found - exact).norm()

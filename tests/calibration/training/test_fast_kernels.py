import dataclasses

import pytest
import torch

from calibration.recipes.efficientdm import EfficientDM
from calibration.run.options import RunOptions
from calibration.student import compiled_fake_quant
from calibration.student.compiled_fake_quant import compiled_fake_quantize
from calibration.student.fake_quant import fake_quantize
from calibration.training import fast_kernels
from calibration.training.cpp.fake_quant import cpp_fake_quantize
from calibration.training.distillation import distill
from calibration.training.fast_kernels import kernels_of, use_fast_kernels
from edm_deploy.errors import InputError, UnsupportedError
from tests.calibration.tiny import tiny_context

RECIPE = EfficientDM(rows=2, rank=2, calibration_samples=2, steps=3, batch=2, compute="fp32", step_weighting=0.0)
FUNCTIONS = {"cpp": cpp_fake_quantize, "inductor": compiled_fake_quantize, "torch": fake_quantize}


@pytest.fixture
def no_compiler(monkeypatch):
    def fail():
        raise UnsupportedError("A C++ compiler is needed for this, and none is installed.")

    monkeypatch.setattr(fast_kernels, "library", fail)
    fast_kernels._compiles.cache_clear()
    yield
    fast_kernels._compiles.cache_clear()


def context_of(**options):
    context = tiny_context(RECIPE)
    return dataclasses.replace(context, run=dataclasses.replace(context.run, options=RunOptions(teacher_dtype="fp32", **options)))


def test_auto_is_the_kernels_for_cpus_on_a_cpu_and_torch_on_a_gpu():
    assert kernels_of(RunOptions()) == "cpp"
    assert kernels_of(RunOptions(device="cuda")) == "torch"
    assert [kernels_of(RunOptions(kernels=name)) for name in FUNCTIONS] == list(FUNCTIONS)


def test_without_a_compiler_auto_says_so_once_and_goes_on(no_compiler, monkeypatch):
    warnings = []
    monkeypatch.setattr(fast_kernels.log, "warning", lambda text, *values: warnings.append(text % values))
    assert [kernels_of(RunOptions()) for _ in range(3)] == ["torch"] * 3
    assert warnings == ["A C++ compiler is needed for this, and none is installed. Training goes on without them."]
    with pytest.raises(UnsupportedError, match="none is installed"):
        kernels_of(RunOptions(kernels="cpp"))


def test_unknown_kernels_and_kernels_for_another_device_are_refused():
    with pytest.raises(InputError, match="kernels is 'fast'; expected auto, cpp, inductor, torch"):
        RunOptions(kernels="fast")
    with pytest.raises(InputError, match="--kernels cpp: the kernels in C\\+\\+ are for a CPU, and --device is cuda"):
        kernels_of(RunOptions(kernels="cpp", device="cuda"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_layers_and_tables_quantize_by_the_chosen_kernels(name, monkeypatch):
    monkeypatch.setattr(fast_kernels, "_compile_once", lambda device: None)
    context = context_of(kernels=name)
    use_fast_kernels(context)
    layers = [*context.student.layers.values(), *context.student.quantizers.values()]
    assert {each.fake_quantize for each in layers} == {FUNCTIONS[name]}


def test_a_machine_where_torch_compile_fails_is_refused(monkeypatch):
    def fail(*args):
        raise RuntimeError("No working C++ compiler found.\nDetails")

    monkeypatch.setattr(fast_kernels, "compiled_fake_quantize", fail)
    fast_kernels._compile_once.cache_clear()
    with pytest.raises(
        UnsupportedError, match=r"torch.compile fails here \(No working C\+\+ compiler found\.?\)\. Install a C\+\+ compiler"
    ):
        use_fast_kernels(context_of(kernels="inductor"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_a_training_ends_where_torchs_operators_lead_within_float32(checkpointing, monkeypatch):
    """`inductor` uncompiled: what torch.compile makes of the functions is compared in tests/calibration/student/test_compiled_fake_quant.py."""
    monkeypatch.setattr(compiled_fake_quant, "_compiled", lambda function: function)
    trained = []
    for choice in ("torch", "cpp", "inductor"):
        context = context_of(kernels=choice, checkpointing=checkpointing)
        RECIPE.prepare(context)
        before = {name: value.detach().clone() for name, value in context.student.learnable().items()}
        distill(context, RECIPE.groups(context.student), RECIPE.schedule)
        after = {name: value.detach().clone() for name, value in context.student.learnable().items()}
        trained.append((context.run.notes["first_loss"], before, after))
    (loss, before, eager), *others = trained
    moved = {name for name in eager if not torch.equal(eager[name], before[name])}
    assert moved
    # Adam's first steps are signs of gradients: where one is nearly 0 its sign may differ, so that a share of the whole movement is compared.
    movement = sum(float((eager[name] - before[name]).square().sum()) for name in moved)
    for other, _, after in others:
        assert other == pytest.approx(loss, rel=1e-6)
        assert sum(float((after[name] - eager[name]).square().sum()) for name in moved) < 0.01 * movement


@pytest.mark.parametrize("kernels", ["cpp", "torch"])
def test_activations_are_computed_again_in_bfloat16_by_the_kernels_of_the_forward_pass(kernels):
    recipe = dataclasses.replace(RECIPE, compute="bf16", steps=1)
    context = context_of(checkpointing=True, kernels=kernels)
    recipe.prepare(context)
    distill(context, recipe.groups(context.student), recipe.schedule)  # torch compares what is saved with what is computed again
    assert context.run.notes["first_loss"] > 0

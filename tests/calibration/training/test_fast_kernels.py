import dataclasses

import pytest
import torch

from calibration.recipes.efficientdm import EfficientDM
from calibration.run.options import RunOptions
from calibration.student import compiled_fake_quant
from calibration.student.compiled_fake_quant import compiled_fake_quantize
from calibration.student.fake_quant import fake_quantize
from calibration.training import fast_kernels
from calibration.training.distillation import distill
from calibration.training.fast_kernels import COMPILE_SECONDS, GAIN, compiles, use_fast_kernels
from edm_deploy.errors import InputError, UnsupportedError
from tests.calibration.tiny import tiny_context

RECIPE = EfficientDM(rows=2, rank=2, calibration_samples=2, steps=3, batch=2, compute="fp32", step_weighting=0.0)


def test_a_long_budget_on_a_cpu_compiles_and_a_number_of_steps_does_not():
    assert not compiles(RunOptions())
    assert not compiles(RunOptions(budget_seconds=60.0))
    assert compiles(RunOptions(budget_seconds=300.0))
    assert not compiles(RunOptions(budget_seconds=300.0, torch_compile="off"))
    assert not compiles(RunOptions(budget_seconds=3000.0, device="cuda"))
    assert compiles(RunOptions(torch_compile="on"))


def test_the_shortest_run_that_compiles_gains_more_than_it_costs():
    shortest = next(seconds for seconds in range(10_000) if seconds and compiles(RunOptions(budget_seconds=float(seconds))))
    assert shortest * GAIN > COMPILE_SECONDS


def test_an_unknown_choice_is_refused():
    with pytest.raises(InputError, match="torch_compile is 'maybe'; expected auto, on, off"):
        RunOptions(torch_compile="maybe")


def context_of(**options):
    context = tiny_context(RECIPE)
    return dataclasses.replace(context, run=dataclasses.replace(context.run, options=RunOptions(teacher_dtype="fp32", **options)))


def test_only_a_run_that_compiles_quantizes_by_compiled_kernels(monkeypatch):
    monkeypatch.setattr(fast_kernels, "_compile_once", lambda device: None)
    for choice, expected in (("off", fake_quantize), ("on", compiled_fake_quantize)):
        context = context_of(torch_compile=choice)
        use_fast_kernels(context)
        layers = [*context.student.layers.values(), *context.student.quantizers.values()]
        assert {each.fake_quantize for each in layers} == {expected}


def test_a_machine_without_a_compiler_is_refused_where_one_was_requested_and_announced_otherwise(monkeypatch):
    def fail(device):
        raise RuntimeError("No working C++ compiler found.\nDetails")

    monkeypatch.setattr(fast_kernels, "_compile_once", fail)
    with pytest.raises(UnsupportedError, match=r"torch.compile fails here \(No working C\+\+ compiler found\)\. Install a C\+\+ compiler"):
        use_fast_kernels(context_of(torch_compile="on"))
    context, warnings = context_of(budget_seconds=3000.0), []
    monkeypatch.setattr(fast_kernels.log, "warning", lambda text, *values: warnings.append(text % values))
    use_fast_kernels(context)
    assert warnings == ["torch.compile fails here (No working C++ compiler found); training goes on without it."]
    assert next(iter(context.student.layers.values())).fake_quantize is fake_quantize


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_a_training_by_compiled_kernels_is_the_eager_one_within_float32(checkpointing, monkeypatch):
    """Uncompiled: what torch.compile makes of the functions is compared in tests/calibration/student/test_compiled_fake_quant.py."""
    monkeypatch.setattr(compiled_fake_quant, "_compiled", lambda function: function)
    trained = []
    for choice in ("off", "on"):
        context = context_of(torch_compile=choice, checkpointing=checkpointing)
        RECIPE.prepare(context)
        before = {name: value.detach().clone() for name, value in context.student.learnable().items()}
        distill(context, RECIPE.groups(context.student), RECIPE.schedule)
        after = {name: value.detach().clone() for name, value in context.student.learnable().items()}
        trained.append((context.run.notes["first_loss"], before, after))
    (loss, before, eager), (other, _, compiled) = trained
    assert other == pytest.approx(loss, rel=1e-6)
    moved = {name for name in eager if not torch.equal(eager[name], before[name])}
    assert moved
    # Adam's first steps are signs of gradients: where one is nearly 0 its sign may differ, so that a share of the whole movement is compared.
    apart = sum(float((compiled[name] - eager[name]).square().sum()) for name in moved)
    movement = sum(float((eager[name] - before[name]).square().sum()) for name in moved)
    assert apart < 0.01 * movement


def test_activations_are_computed_again_in_bfloat16_by_the_kernels_of_the_forward_pass():
    recipe = dataclasses.replace(RECIPE, compute="bf16", steps=1)
    context = context_of(checkpointing=True)
    recipe.prepare(context)
    distill(context, recipe.groups(context.student), recipe.schedule)  # torch compares what is saved with what is computed again
    assert context.run.notes["first_loss"] > 0

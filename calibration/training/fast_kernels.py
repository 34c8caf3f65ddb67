"""Which kernels a training runs on: those for bfloat16 on a CPU, and fake quantization compiled by torch.compile where that pays for itself."""

from __future__ import annotations

import logging

import torch

from calibration.recipe import TrainingContext
from calibration.run.options import RunOptions
from calibration.student.compiled_fake_quant import compiled_fake_quantize
from calibration.training.cpu_kernels import use_cpu_kernels
from edm_deploy.errors import UnsupportedError, first_line

log = logging.getLogger(__name__)
# Measured on one core of an AMD EPYC (Zen 5), reference model, batch 32, 2026-11-22, torch 2.13.0: five kernels, whatever the model is, took 9.6 s of CPU time; a step
# 1.33 s in place of 1.51 s.
COMPILE_SECONDS = 10.0
GAIN = 0.12  # of a step's time
MARGIN = 3.0  # gains over costs from which `auto` compiles: other machines compile more slowly


def use_fast_kernels(context: TrainingContext) -> None:
    """Replace slow operations of student and teacher, in place, as the run's options and its device allow.

    Raises:
        UnsupportedError: `torch_compile` is `on`, and nothing can be compiled here.
    """
    options = context.run.options
    for network in (context.student, context.teacher):
        use_cpu_kernels(network.model)
    if not compiles(options):
        return
    try:
        _compile_once(torch.device(options.device))
    except Exception as err:  # torch raises what its compilers raise: no compiler, no Triton, a compiler that fails
        if options.torch_compile == "on":
            raise UnsupportedError(
                f"--torch-compile on: torch.compile fails here ({first_line(err)}). Install a C++ compiler, or on a GPU Triton, or pass --torch-compile off."
            ) from err
        log.warning("torch.compile fails here (%s); training goes on without it.", first_line(err))
        return
    context.student.quantize_by(compiled_fake_quantize)


def compiles(options: RunOptions) -> bool:
    """Whether a run compiles: `on`; under `auto`, on a CPU, where a budget is long enough that its gain is several times the time of compiling.

    A run of a number of steps is reproducible bit for bit, and a clock must not decide how it computes: there `auto` is `off`. A resumed run has the options of
    the interrupted one, and decides alike.
    """
    if options.torch_compile != "auto":
        return options.torch_compile == "on"
    return options.device == "cpu" and (options.budget_seconds or 0.0) * GAIN >= MARGIN * COMPILE_SECONDS


def _compile_once(device: torch.device) -> None:
    """Compile for float32 on a few numbers, so that a machine without a compiler is found before training."""
    x = torch.linspace(-1, 1, 6, device=device).view(2, 3).requires_grad_()
    scale, qmin = torch.full((2,), 0.5, device=device), torch.full((2,), -1.0, device=device)
    compiled_fake_quantize(x, scale, qmin, 2)

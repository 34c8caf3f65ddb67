"""Which kernels a training runs on: ours in C++ on a CPU, fake quantization by torch.compile, or torch's own."""

from __future__ import annotations

import functools
import logging

import torch

from calibration.recipe import TrainingContext
from calibration.run.options import RunOptions
from calibration.student.compiled_fake_quant import compiled_fake_quantize
from calibration.training.cpp.fake_quant import cpp_fake_quantize
from calibration.training.cpp.group_norm import use_cpp_norms
from calibration.training.cpp.library import library
from calibration.training.cpu_kernels import use_cpu_kernels
from edm_deploy.errors import InputError, UnsupportedError, first_line

log = logging.getLogger(__name__)


def use_fast_kernels(context: TrainingContext) -> None:
    """Replace slow operations of student and teacher, in place, as the run's options and its device allow.

    Raises:
        InputError, UnsupportedError: As kernels_of.
    """
    kernels = kernels_of(context.run.options)
    for network in (context.student, context.teacher):
        use_cpu_kernels(network.model)
        if kernels == "cpp":
            use_cpp_norms(network.model)
    if kernels == "cpp":
        context.student.quantize_by(cpp_fake_quantize)
        context.student.channels_last = context.student.compute_dtype != torch.float32
    elif kernels == "inductor":
        context.student.quantize_by(compiled_fake_quantize)


def kernels_of(options: RunOptions) -> str:
    """`cpp`, `inductor` or `torch`: what `auto` is here. It depends on the machine alone, so that a run is resumed by the same kernels.

    Raises:
        InputError: `kernels` is `cpp`, and the device is no CPU.
        UnsupportedError: The kernels were requested and cannot be compiled here.
    """
    if options.kernels == "cpp" and options.device != "cpu":
        raise InputError(f"--kernels cpp: the kernels in C++ are for a CPU, and --device is {options.device}. Leave --kernels out.")
    if options.kernels == "cpp":
        library()
    elif options.kernels == "inductor":
        _compile_once(options.device)
    if options.kernels != "auto":
        return options.kernels
    return "cpp" if options.device == "cpu" and _compiles() else "torch"


@functools.cache
def _compiles() -> bool:
    """Whether the kernels in C++ are there or can be compiled; where not, it is said once."""
    try:
        library()
    except UnsupportedError as err:
        log.warning("%s Training goes on without them.", err)
        return False
    return True


@functools.cache
def _compile_once(device: str) -> None:
    """Compile for float32 on a few numbers, so that a machine without a compiler is found before training."""
    x = torch.linspace(-1, 1, 6, device=device).view(2, 3).requires_grad_()
    scale, qmin = torch.full((2,), 0.5, device=device), torch.full((2,), -1.0, device=device)
    try:
        compiled_fake_quantize(x, scale, qmin, 2)
    except Exception as err:  # torch raises what its compilers raise: no compiler, no Triton, a compiler that fails
        raise UnsupportedError(
            f"--kernels inductor: torch.compile fails here ({first_line(err)}). Install a C++ compiler, or on a GPU Triton, or leave --kernels out."
        ) from err

"""Errors sown into the arithmetic, one at a time, and the process that runs tests on a copy of the sources with one of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("edm_deploy", "calibration", "engines", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """One wrong line.

    Attributes:
        file: Of the repository.
        old: A text that it holds exactly once.
        new: What that becomes.
        tests: Test files or test ids, below tests/, of which one must fail.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


CODES, TABLE, LAYOUT = (f"edm_deploy/numerics/{name}.py" for name in ("codes", "activation_table", "kernel_layout"))
REFERENCE, CORRECTION, ROUTING = (f"edm_deploy/artifact/{name}.py" for name in ("reference", "timestep_correction", "timestep_routing"))
GUIDANCE, SCHEDULES = "edm_deploy/pipelines/guidance.py", "edm_deploy/pipelines/noise_schedules.py"
LAYERS, FAKE_QUANT = "calibration/student/layers.py", "calibration/student/fake_quant.py"
ADAROUND, RESIDUAL = "calibration/reconstruction/adaround.py", "calibration/training/binary_residual.py"
TORCH_OPS, PACKED = "engines/kernels/torch_ops.py", "engines/torch_graph/packed_layer.py"


def tests_of(file: str) -> tuple[str, ...]:
    """The test file that mirrors a source file."""
    folder, _, name = file.rpartition("/")
    return (f"{folder}/test_{name}",)


def mutant(file: str, old: str, new: str, *tests: str) -> Mutant:
    """A mutant that the mirrored test file must find, or `tests` instead."""
    return Mutant(file, old, new, tests or tests_of(file))


BY_HAND = "edm_deploy/artifact/test_reference.py::test_a_linear_site_by_hand"
MIXED_ROWS = "edm_deploy/artifact/test_reference.py::test_each_sample_of_a_batch_uses_its_own_row"
EXACT_SUMS = "edm_deploy/artifact/test_reference.py::test_sums_that_float32_cannot_hold_are_carried_in_float64"
OPS = tuple(
    f"engines/kernels/test_ops.py::test_{name}"
    for name in (
        "a_code_rounds_half_to_even_and_stops_at_its_bounds",
        "each_sample_has_its_own_row",
        "one_product_by_hand",
        "a_convolution_agrees_with_the_reference",
        "the_epilogue_is_float32_step_by_step",
    )
)
MUTANTS = {
    # codes and tables
    "a weight's range is turned round": mutant(
        CODES,
        "return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1\n\n\ndef symmetric",
        "return 1 - 2 ** (bits - 1), 2 ** (bits - 1)\n\n\ndef symmetric",
    ),
    "8-bit weights reach -128": mutant(CODES, "return -127, 127", "return -128, 127"),
    "weights are rounded half up": mutant(
        CODES, "(weight / per_channel(scale, weight)).round_()", "(weight / per_channel(scale, weight) + 0.5).floor_()"
    ),
    "the scale of weights is transposed": mutant(
        CODES, "return values.reshape(-1, *[1] * (like.ndim - 1))", "return values.reshape(*[1] * (like.ndim - 1), -1)"
    ),
    "the first code lies in the high nibble": mutant(
        CODES, "return (flat[0::2] & 0xF) | ((flat[1::2] & 0xF) << 4)", "return (flat[1::2] & 0xF) | ((flat[0::2] & 0xF) << 4)"
    ),
    "low nibbles lose their sign": mutant(CODES, "(signed << 4) >> 4, signed >> 4", "signed & 0xF, signed >> 4"),
    "activations are rounded half up": mutant(TABLE, "(x * inv_scale).round_()", "(x * inv_scale + 0.5).floor_()"),
    "the lowest and the highest code are swapped": mutant(TABLE, ".round_(), qmin), qmax)", ".round_(), qmax), qmin)"),
    "the row is that of the timestep before": mutant(
        TABLE, ".clamp(0, len(row_of_timestep) - 1).long()", ".sub(1).clamp(0, len(row_of_timestep) - 1).long()"
    ),
    "a fractional timestep is cut off": mutant(TABLE, "timesteps.double().round()", "timesteps.double().floor()"),
    "every sample takes the first one's row": mutant(TABLE, "return column[rows].float()", "return column[rows[:1]].float()", MIXED_ROWS),
    "kernels read the nibbles of a byte in the wrong order": mutant(
        LAYOUT, "(padded[..., 0::2] & 0xF) | (padded[..., 1::2] << 4)", "(padded[..., 1::2] & 0xF) | (padded[..., 0::2] << 4)"
    ),
    "padding is the lowest code, not real 0": mutant(LAYOUT, "zero = -qmin if unsigned else", "zero = 0 * qmin if unsigned else"),
    # the reference, and what the runtime does outside the graph
    "a site's bias is forgotten": mutant(REFERENCE, "y = y + self._per_output(self.bias, y)", "y = y + 0", BY_HAND),
    "the input's scale is forgotten": mutant(
        REFERENCE, "total * weight_scale * per_sample(", "total * weight_scale + 0 * per_sample(", BY_HAND
    ),
    "sums of integers lose their last bits": mutant(REFERENCE, "< 2**24 else torch.float64", "< 2**40 else torch.float64", EXACT_SUMS),
    "the sample is shifted the wrong way": mutant(CORRECTION, "-self._at(self.input_bias", "self._at(self.input_bias"),
    "samples come back in another order": mutant(
        ROUTING, "torch.cat(places).argsort()", "torch.cat(places)", "edm_deploy/artifact/test_relaxed_timesteps.py"
    ),
    "guidance has the wrong sign": mutant(GUIDANCE, " + self.scale * (", " - self.scale * ("),
    # schedules
    "a DDIM step ends where it begins": mutant(SCHEDULES, "self.alphas[positions.cpu() + 1]", "self.alphas[positions.cpu()]"),
    "v is combined with the wrong sign": mutant(
        SCHEDULES, "a * sample - b * prediction, a * prediction", "a * sample + b * prediction, a * prediction"
    ),
    "a flow goes back to noise": mutant(SCHEDULES, "(then - now) * prediction", "(now - then) * prediction"),
    "the last rate is not the smallest": mutant(
        "calibration/training/distillation.py",
        'fall = 1 - share if self.decay == "linear"',
        'fall = share if self.decay == "linear"',
        "calibration/training/test_distillation.py::test_rates_rise_and_fall_linearly",
    ),
    # the student
    "a table of the student's is one code too wide": mutant(
        LAYERS, "(qmin + self.levels).to(torch.int8)", "(qmin + self.levels + 1).to(torch.int8)"
    ),
    "the low-rank update is not merged": mutant(
        LAYERS, "torch.addmm(weight.flatten(1), self.lora_b, self.lora_a).view_as(weight)", "weight"
    ),
    "a bias makes the rounding's error worse": mutant(LAYERS, "self.layer.bias.float() + (", "self.layer.bias.float() - ("),
    "clipped values have a gradient": mutant(
        FAKE_QUANT, "torch.ops.aten.hardtanh_backward(grad, position, -0.5, ctx.levels + 0.5)", "grad.clone()"
    ),
    "the scale's gradient has no rounding error": mutant(FAKE_QUANT, ".addcmul_(grad_x, x, value=-1)", ".addcmul_(grad_x, x, value=0)"),
    "the lowest code's gradient has the wrong sign": mutant(
        FAKE_QUANT, "torch.sub(grad, grad_x, out=position)", "torch.sub(grad_x, grad, out=position)"
    ),
    # losses and searches
    "the divergence is the other way round": mutant(
        "calibration/training/losses.py", "kl_div(log_student, log_teacher,", "kl_div(log_teacher, log_student,"
    ),
    "rounding is decided against what was learned": mutant(ADAROUND, "(self.logits >= 0)", "(self.logits < 0)"),
    "the rounding's regularizer never ends": mutant(ADAROUND, "(1 - (share - WARMUP) / (1 - WARMUP))", "((share - WARMUP) / (1 - WARMUP))"),
    "a range has one level too many": mutant(
        "calibration/observers/scale_search.py", "(high - low) / spec.levels", "(high - low) / (spec.levels + 1)"
    ),
    "the residual's step is the largest error": mutant(RESIDUAL, ".abs().mean(1)", ".abs().amax(1)"),
    # the kernels' arithmetic on the CPU
    "a kernel rounds half up": mutant(TORCH_OPS, "(values * inv_scale).round()", "(values * inv_scale + 0.5).floor()", *OPS),
    "unsigned codes are not corrected": mutant(TORCH_OPS, "total.double() + operands.qmin", "total.double() - operands.qmin", *OPS),
    "the bias is added twice": mutant(TORCH_OPS, "y = y + operands.bias\n", "y = y + operands.bias + operands.bias\n", *OPS),
    "unsigned codes are read as they are stored": mutant(
        PACKED, "values = values + qmin.to(torch.int8)", "values = values + 0 * qmin.to(torch.int8)"
    ),
}
# Fast ones, of each package: an unsound change of what these guard is the most likely of all.
IN_EVERY_RUN = (
    "the row is that of the timestep before",
    "the low-rank update is not merged",
    "unsigned codes are not corrected",
)

# Imports what takes long and is none of ours, then runs pytest in a child process for each line of input: a folder and arguments.
SERVER = """
import importlib, json, os, sys
for name in ("pytest", "torch", "numpy", "onnx", "onnx_ir", "diffusers", "safetensors.torch", "torch.export", "torch._dynamo"):
    importlib.import_module(name)
for line in sys.stdin:
    folder, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        with open("output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        import pytest
        code = int(pytest.main(arguments))
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class MutantRunner:
    """Runs tests on copies of the sources. The copies are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Not from the repository's root: its packages must be found in the copies.
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment()
        )

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def run(self, name: str, mutant: Mutant) -> tuple[int, str]:
        """Exit status and output of pytest: 1 where a test failed. The file that a Mutant without `old` names stays as it is."""
        copy = self.folder / name.replace(" ", "-").replace("'", "").replace(",", "")
        copy.mkdir()
        for each in COPIED:
            if (ROOT / each).is_dir():
                shutil.copytree(ROOT / each, copy / each, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / each, copy / each)
        if mutant.old:
            source = (copy / mutant.file).read_text()
            count = source.count(mutant.old)
            assert count == 1, f"{mutant.file} holds {mutant.old!r} {count} times, expected once: put the mutant where that code is now"
            (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "", *(f"tests/{test}" for test in mutant.tests)]
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(copy), *arguments]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        output = (copy / "output").read_text()
        shutil.rmtree(copy)
        return status, output


def environment() -> dict[str, str]:
    """This process' environment, without what would find the repository's own packages first."""
    import os

    dropped = (
        "PYTHONPATH",
        "PYTEST_ADDOPTS",
        "PYTEST_XDIST_WORKER",
        "PYTEST_XDIST_WORKER_COUNT",
        "PYTEST_XDIST_TESTRUNUID",
        "PYTEST_CURRENT_TEST",
    )
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"PYTHONDONTWRITEBYTECODE": "1"}

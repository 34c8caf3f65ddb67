"""Command-line options that several commands share, and their values."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Device(StrEnum):
    """Device that calibration and training run on."""

    CPU = "cpu"
    CUDA = "cuda"


class Kernels(StrEnum):
    """What a training computes by."""

    AUTO = "auto"
    CPP = "cpp"
    INDUCTOR = "inductor"
    TORCH = "torch"


class FloatType(StrEnum):
    """Floating-point type of an exported graph."""

    FP32 = "fp32"
    FP16 = "fp16"


class TeacherType(StrEnum):
    """Floating-point type of the teacher."""

    FP32 = "fp32"
    BF16 = "bf16"


class Precision(StrEnum):
    """Arithmetic of the float parts of teacher and student."""

    NO = "no"
    BF16 = "bf16"


class ReportFormat(StrEnum):
    """Where the course of a training is written."""

    TENSORBOARD = "tensorboard"


class Storage(StrEnum):
    """Storage type of weight codes in a graph."""

    INT8 = "int8"
    INT4 = "int4"


class Int4(StrEnum):
    """Representation of 4-bit sites in a graph."""

    QDQ = "qdq"
    PLUGIN = "plugin"


class Format(StrEnum):
    """Format that an artifact is exported to."""

    ONNX = "onnx"
    TRITON = "triton"
    POLYGRAPHY = "polygraphy"


def check_out(path: Path) -> Path:
    """`path`, unless it contains the working directory: --out is replaced as a whole.

    Raises:
        BadParameter: It does.
    """
    if path.resolve() in Path.cwd().parents:
        raise typer.BadParameter(f"{path} contains the working directory; expected the name of a new directory.")
    return path


def check_new(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds something, unless `--overwrite` is given; what may be overwritten is checked where it is written.

    Raises:
        InputError: It does.
    """
    from edm_deploy.errors import InputError
    from edm_deploy.storage.output_directory import entries

    if not overwrite and entries(out):
        raise InputError(f"--out {out} exists and is not empty. Pass --overwrite to replace it, or choose another directory.")


def seed_in_range(seed: int | list[int] | None) -> int | list[int] | None:
    """`seed`, one or several, if each is in the range of a seed.

    Raises:
        BadParameter: It is not.
    """
    from edm_deploy.errors import InputError
    from edm_deploy.numerics.seeds import check_seed

    try:
        for each in seed if isinstance(seed, list) else [] if seed is None else [seed]:
            check_seed(each)
    except InputError as err:
        raise typer.BadParameter(str(err)) from err
    return seed


def seed_option(what: str) -> Any:  # typer's OptionInfo
    """An option for a seed, 0 to 2^63 - 1."""
    return typer.Option("--seed", metavar="N", callback=seed_in_range, help=what)


def evaluation_seeds(given: list[int] | None) -> tuple[int, ...]:
    """The seeds of `EvaluationSeeds`; 123 where none is given."""
    return tuple(given or (123,))


def example(command: str) -> str:
    """The last line of a command's help."""
    return f"Example: edm-deploy {command}"


def value(choice: StrEnum | None) -> str | None:
    """The value of a choice; None if none was made."""
    return None if choice is None else choice.value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local diffusers directory, or a hub id such as google/ddpm-cifar10-32.")]
EvaluationSeeds = Annotated[
    list[int] | None,
    typer.Option(
        "--seed",
        metavar="N",
        callback=seed_in_range,
        help="Seed of the initial noise; repeatable, figures are then means over the seeds, with the spread of the PSNR. Default: 123.",
    ),
]
Engine = Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="Directory written by build-engine.")]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", callback=check_out, help="Output directory; written completely or not at all."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what a previous run of this command wrote into --out. Other files are never removed.")
]
WeightBits = Annotated[int | None, typer.Option("--weight-bits", help="Bits of the weights, 2 to 8. Default: the recipe's.")]
ActBits = Annotated[
    int | None,
    typer.Option("--act-bits", help="Bits of the layers' inputs, 3 to 8; 16 leaves them in floating point. Default: the recipe's."),
]
Rows = Annotated[
    int | None, typer.Option("--rows", help="Number of calibrated timesteps, one table row each. Default: the recipe's, usually 100.")
]
Seed = Annotated[int | None, seed_option("Random seed of calibration and training. Default: 0.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings of the recipe.")]
Preset = Annotated[str | None, typer.Option("--preset", metavar="NAME", help="Shipped settings of the recipe, for example demo.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe, or of a pass as PASS.KEY=VALUE; repeatable."),
]
With = Annotated[
    list[str] | None, typer.Option("--with", metavar="PASS", help="Pass to compose the recipe with: allocate, tac, pcr or adp; repeatable.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="TIME", help="Wall time of calibration and training, such as 30s, 5m or 1h, instead of a number of steps."
    ),
]
CheckpointEvery = Annotated[
    str, typer.Option("--checkpoint-every", metavar="TIME", help="Wall time between checkpoints of training, such as 30s, 10m or 1h.")
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes", metavar="N", min=1, help="Divide the work among N processes of this machine: on the CPU, or one for each GPU."
    ),
]
Accumulation = Annotated[
    int,
    typer.Option(
        "--gradient-accumulation-steps", metavar="K", min=1, help="Run each process's share of a batch in K parts, one after the other."
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Compute the student's activations again in the backward pass: slower, in less memory."),
]
TrainingKernels = Annotated[
    Kernels,
    typer.Option(
        "--kernels",
        help="Fake quantization of a training: cpp, kernels for CPUs; inductor, torch.compile; torch. auto: cpp on a CPU with a C++ compiler.",
    ),
]
Sharding = Annotated[
    bool,
    typer.Option("--shard-weights", help="Divide frozen float weights among the processes, which gather each layer's as it runs (FSDP2)."),
]
MixedPrecision = Annotated[
    Precision | None,
    typer.Option(
        "--mixed-precision",
        help="Float parts of teacher and student under bfloat16 autocast, or all in float32 (no). Default: the recipe's compute and --teacher-dtype.",
    ),
]
ReportTo = Annotated[
    ReportFormat | None,
    typer.Option("--report-to", help="Write losses, and pictures of student and teacher, to DIR.tensorboard next to --out while training."),
]
For = Annotated[
    str | None, typer.Option("--for", metavar="BACKEND", help="Check first that this backend supports the request; for example openvino.")
]
EngineDevice = Annotated[
    Device | None,
    typer.Option(
        "--device", help="Where engines run. Default: the device of their backend. On cpu, a cuda engine emulates its arithmetic, slowly."
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where calibration and training run.")]
Teacher = Annotated[
    TeacherType | None, typer.Option("--teacher-dtype", help="Floating-point type of the teacher during training. Default: bf16.")
]
FoldTime = Annotated[
    bool,
    typer.Option(
        "--fold-time/--no-fold-time",
        help="Keep layers that depend on the timestep alone in floating point, so that export can replace them by a table.",
    ),
]
Profile = typer.Option(metavar="MIN:OPT:MAX", help="Sizes that the engine accepts; one number sets all three.")
LoraRank = Annotated[
    int | None,
    typer.Option(
        "--lora-rank", metavar="R", help="Rank slots for LoRAs at run time, all loaded ones together; their weights become inputs."
    ),
]
LoraLayers = Annotated[
    str | None,
    typer.Option(
        "--lora-layers",
        metavar="REGEX",
        help="Quantized layers that a LoRA may change, by published name. Default: attention and transformer blocks; '.' is all.",
    ),
]
NegativePrompt = Annotated[
    str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What the images should not show; needs --guidance above 1.")
]
PipelineSource = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="MODEL",
        help="Pipeline that provides text encoders and VAE, if the engine's directory does not. Default: the model that was quantized.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:WEIGHT]", help="LoRA of diffusers, PEFT or kohya, with its weight, 1 by default; repeatable."),
]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Load float weights only while their layer runs: slower, the same result in less memory.")
]
Force = Annotated[bool, typer.Option("--force", help="Start although memory is expected to run out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="Text file with one prompt a line, for a text-conditional model. Default: a built-in list."
    ),
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale, 0 or more; 1 is off. Default: the usual scale of the model.")
]

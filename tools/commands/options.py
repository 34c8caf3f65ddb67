"""The command line's options that several commands share, and the values that they are written in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where calibration and training run."""

    CPU = "cpu"
    CUDA = "cuda"


class FloatType(StrEnum):
    """Floating-point type of an exported graph."""

    FP32 = "fp32"
    FP16 = "fp16"


class TeacherType(StrEnum):
    """Floating-point type that the teacher runs in."""

    FP32 = "fp32"
    BF16 = "bf16"


class Storage(StrEnum):
    """How weight codes are stored in a graph."""

    INT8 = "int8"
    INT4 = "int4"


class Int4(StrEnum):
    """How sites whose codes fit 4 bits stand in a graph."""

    QDQ = "qdq"
    PLUGIN = "plugin"


class Format(StrEnum):
    """What an artifact is exported to."""

    ONNX = "onnx"


class Int4Sites(StrEnum):
    """Which sites of 4 bits run in INT4."""

    FITS = "fits"
    FASTER = "faster"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local diffusers directory, or a hub id such as google/ddpm-cifar10-32.")]
Engine = Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="What build-engine wrote.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write; appears whole or not at all.")]
WeightBits = Annotated[int | None, typer.Option("--weight-bits", help="Bits of the weights, 2 to 8.")]
ActBits = Annotated[int | None, typer.Option("--act-bits", help="Bits of the layers' inputs, 3 to 8.")]
Rows = Annotated[int | None, typer.Option("--rows", help="Timesteps to calibrate; one table row each.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of everything random.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings of the recipe.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Settings shipped in calibration/presets.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="One setting of the recipe, or pass.setting=V; may be given again.")
]
For = Annotated[str | None, typer.Option("--for", metavar="BACKEND", help="Refuse at once what this backend cannot carry.")]
EngineDevice = Annotated[
    Device | None,
    typer.Option("--device", help="Where engines run; default: where their backend does. cuda engines check arithmetic on cpu."),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to calibrate or train.")]
Teacher = Annotated[TeacherType | None, typer.Option("--teacher-dtype", help="The teacher's floating-point type.")]
FoldTime = Annotated[
    bool,
    typer.Option(
        "--fold-time/--no-fold-time", help="Leave layers that see the timestep alone in floating point: exports make a table of them."
    ),
]
Profile = typer.Option(metavar="MIN:OPT:MAX", help="Sizes that the engine takes; one number stands for all three.")
Int4Where = Annotated[
    Int4Sites | None, typer.Option("--int4-where", help="faster: INT8 where 4 bits are expected to gain nothing on --gpu; for cuda.")
]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Leave the float weights in their files until a layer runs: slower, same result.")
]
Force = Annotated[bool, typer.Option("--force", help="Begin even where memory is expected to run out.")]
Json = Annotated[bool, typer.Option("--json", help="Print json and nothing else on stdout.")]


With = Annotated[list[str] | None, typer.Option("--with", metavar="PASS", help="A pass to compose the recipe with; may be given again.")]
Budget = Annotated[
    str | None,
    typer.Option("--budget", metavar="TIME", help="Wall time of calibration and training, such as 30s, 5m or 1h, in place of steps."),
]


def example(command: str) -> str:
    """The last line of a command's help."""
    return f"Example: edm-deploy {command}"


Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="What a model that takes text is told, one prompt a line; default: a built-in list."),
]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Scale of the guidance; 1 is off. Default: the model's usual one.")]


def value(chosen: StrEnum | None) -> str | None:
    """What a choice is called, or None where none was made."""
    return None if chosen is None else chosen.value

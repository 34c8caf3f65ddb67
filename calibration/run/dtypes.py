"""Compute dtypes of teacher and student, by the names used in options and settings."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from edm_deploy.errors import InputError

ComputeDtype = Literal["bf16", "fp32"]
TeacherDtype = Literal["bf16", "fp32", "bf16-autocast"]  # the last: float32 weights, products in bfloat16
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_teacher_dtype(value: str) -> None:
    """Raises InputError if `value` is not the name of a teacher's dtype."""
    if value not in get_args(TeacherDtype):
        raise InputError(f"teacher_dtype is {value!r}; expected {', '.join(get_args(TeacherDtype))}. Set another teacher_dtype.")


def check_dtype(name: str, value: str) -> None:
    """Raises InputError if setting `name` is not the name of a compute dtype."""
    if value not in DTYPES:
        raise InputError(f"{name} is {value!r}; expected {' or '.join(DTYPES)}. Set another {name}.")

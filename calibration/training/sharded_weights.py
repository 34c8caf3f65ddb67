"""Frozen weights divided among the processes of a run: each holds a part, and gathers a layer's weight while that layer runs.

Source: Zhao et al., PyTorch FSDP, arXiv 2304.11277; torch.distributed.fsdp.fully_shard (FSDP2). What is trained stays whole in each process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from calibration.run.processes import Processes
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from calibration.training.activation_checkpoints import outermost_blocks


@contextmanager
def sharded(
    student: Student, teacher: Teacher, trained: Collection[nn.Parameter], processes: Processes, device: torch.device
) -> Iterator[None]:
    """Within the context the blocks of the teacher, and those float weights of the student that are not trained, are divided among the processes.

    Afterwards the student's weights are whole again. The processes must run the same forward passes.
    """
    mesh = init_device_mesh(device.type, (processes.size,))
    kept = {id(parameter) for parameter in trained}
    layers = [layer for layer in student.layers.values() if id(layer.layer.weight) not in kept]
    for layer in layers:
        _make_contiguous(layer)
        fully_shard(layer, mesh=mesh, ignored_params={each for each in layer.parameters() if each is not layer.layer.weight})
    for block in outermost_blocks(teacher.model):
        _make_contiguous(block)
        fully_shard(block, mesh=mesh)
    try:
        yield
    finally:
        for layer in layers:
            assert isinstance(layer, FSDPModule)  # fully_shard changes the class
            layer.unshard()


def _make_contiguous(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard takes no channels_last

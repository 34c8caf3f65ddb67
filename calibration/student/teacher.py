"""The teacher: the float model, which leads the sampling trajectories and provides training targets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calibration.run.dtypes import DTYPES, TeacherDtype
from edm_deploy.errors import ArtifactError
from edm_deploy.network.family import SAMPLE
from edm_deploy.network.low_rank_branch import BranchedLayer
from edm_deploy.network.restructure import NetworkRewrite, restructure
from edm_deploy.pipelines.source import Source
from edm_deploy.storage.weight_loading import cast


class Teacher(nn.Module):
    """The float model: graph inputs by name to float32 prediction, without gradients.

    Args:
        source: Its model is not changed; tensors that are already on `device` are shared with it.
        device: Device of the teacher.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        super().__init__()
        self.family, self.config = source.family_object, source.config
        self.model = share_weights(source.model, device)
        for layer in self.model.modules():
            if isinstance(layer, BranchedLayer):
                layer.branch = None  # it is 0
        self.dtype, self.autocast = torch.float32, False

    def set_dtype(self, name: TeacherDtype) -> None:
        """Compute in this dtype from now on; in float32, and under autocast, the weights remain those of the source."""
        self.autocast = name == "bf16-autocast"
        self.dtype = torch.float32 if self.autocast else DTYPES[name]
        if self.dtype != torch.float32:
            cast(self.model, self.dtype)

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Prediction, float32 [B, ...]."""
        with torch.autocast(inputs[SAMPLE].device.type, torch.bfloat16, enabled=self.autocast):
            return self.family.prediction(self.config, self.family.forward(self.model, cast_inputs(inputs, self.dtype))).float()


def check_finite_weights(source: Source) -> None:
    """Raises ArtifactError where a weight of the float model is NaN or infinite: every later message would name a result of it."""
    for name, value in source.model.named_parameters():
        if not bool(value.isfinite().all()):
            raise ArtifactError(
                f"{source.name}: weight {name!r} holds NaN or infinity, expected finite numbers. Download or save the model again."
            )


def restructured(source: Source, structure: NetworkRewrite) -> Source:
    """The source with its layers split into segments. Its own model is not changed, and shares all other tensors with the result."""
    if not structure:
        return source
    model = share_weights(source.model, torch.device("cpu"))
    restructure(model, structure)
    return replace(source, model=model)


def share_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the module tree on the same tensors: replacing a layer or a parameter in one does not affect the other."""
    memo: dict[int, Any] = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in model.parameters()}
    memo |= {id(value): value for value in model.buffers()}
    shared: nn.Module = copy.deepcopy(model, memo).to(device).eval()
    # channels_last: the fast layout of bfloat16 convolutions, on CPUs and GPUs. No copy if the weights have it already.
    for parameter in shared.parameters():
        if parameter.ndim == 4 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return shared


def cast_inputs(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`inputs` with floating-point tensors in `dtype`, except the timestep: it stays float32, because bfloat16 would round it."""
    return {name: value.to(dtype) if value.is_floating_point() and name != "timestep" else value for name, value in inputs.items()}

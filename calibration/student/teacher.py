"""The teacher: the float model that leads trajectories and gives the targets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.network.restructure import NetworkRewrite, restructure
from edm_deploy.pipelines.source import Source
from edm_deploy.storage.weight_loading import cast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Teacher(nn.Module):
    """The float model: graph inputs by name in, float32 prediction out, without gradients.

    Args:
        source: Its model is not changed; its tensors are shared where they lie on `device` already.
        device: Where the teacher lives.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        super().__init__()
        self.family, self.config = source.family_object, source.config
        self.model = share_weights(source.model, device)
        self.dtype = torch.float32

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on; in float32 the weights stay those of the source."""
        self.dtype = dtype
        if dtype != torch.float32:
            cast(self.model, dtype)

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Prediction, float32 [B, ...]; `timestep` stays float32, which holds what bfloat16 would round."""
        return self.family.prediction(self.config, self.family.forward(self.model, cast_inputs(inputs, self.dtype))).float()


def restructured(source: Source, structure: NetworkRewrite) -> Source:
    """The source with its layers cut into segments; its own model is left as it is, and shares every other tensor."""
    if not structure:
        return source
    model = share_weights(source.model, torch.device("cpu"))
    restructure(model, structure)
    return replace(source, model=model)


def share_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """Another tree of modules on the same tensors, so that replacing a layer or a parameter in one leaves the other as it is."""
    memo: dict[int, Any] = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in model.parameters()}
    memo |= {id(value): value for value in model.buffers()}
    shared: nn.Module = copy.deepcopy(model, memo).to(device).eval()
    # channels_last: the layout that bfloat16 convolutions are fast in, on CPUs and GPUs alike. No copy where the weights have it already.
    for parameter in shared.parameters():
        if parameter.ndim == 4 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return shared


def cast_inputs(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`inputs` with floating-point tensors in `dtype`; the timestep stays float32, which holds what bfloat16 would round."""
    return {name: value.to(dtype) if value.is_floating_point() and name != "timestep" else value for name, value in inputs.items()}

"""The student: the fake-quantized copy of a float model that is calibrated and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calibration.run.parallel_map import each_in_a_thread
from calibration.student.layers import ActivationQuantizer, StudentLayer
from calibration.student.quantization_spec import LayerSpec
from calibration.student.teacher import Teacher, share_weights
from edm_deploy.network.family import SAMPLE, Placement
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.restructure import PRE_SCALE, PUBLISHED, NetworkRewrite
from edm_deploy.numerics.activation_table import nearest_rows, table_rows
from edm_deploy.pipelines.source import Source


class Student(nn.Module):
    """The quantized copy: graph inputs by name in, prediction out; rows follow each sample's timestep.

    Args:
        source: Its model is not changed.
        layer_spec: Bit widths of a layer by its name and its family's placement, as `Recipe.layer_spec`.
        weight_scale: Scale of each output channel by weight and bits, as `Recipe.weight_scale`.
        timesteps: int32 [R] ascending, one a table row.
        device: Where the student lives.
        folded: Sites that stay in floating point, because exporters make a table of what they compute.
        segments: Layers of the source's model that are cut already, as `Structure` has them.
        teacher: Its float weights on `device` are the student's too; None shares those of the source.

    Attributes:
        layers: Every quantized layer by site name.
        quantizers: Every activation quantizer by the name of the first site that it serves.
        shared_input: For each site the first one that is fed the very same tensor.
        relaxed_rows: bool [R], rows at which activations stay in floating point; None where there are none.
        shared_row: int32 [R], for each row the one that stands for it; None where each stands for itself.
    """

    def __init__(
        self,
        source: Source,
        layer_spec: Callable[[str, Placement], LayerSpec],
        weight_scale: Callable[[Tensor, int], Tensor],
        timesteps: Tensor,
        device: torch.device,
        *,
        teacher: Teacher | None = None,
        folded: tuple[str, ...] = (),
        segments: Mapping[str, tuple[int, ...]] = PUBLISHED.segments,
    ) -> None:
        super().__init__()
        self.family, self.config = source.family_object, source.config
        self.model = share_weights(teacher.model if teacher else source.model, device)
        self.timesteps = timesteps
        self.row_of_timestep = nearest_rows(timesteps, source.num_train_timesteps)
        self.compute_dtype = torch.float32
        self.folded = folded
        self.relaxed_rows: Tensor | None = None
        self.shared_row: nn.Parameter | None = None  # a parameter, so that checkpoints hold it
        self.segments = segments
        sites = {name: layer for name, layer in self.family.sites(self.model).items() if name not in folded}
        shared = model_work(self.family, source.config, NetworkRewrite(segments)).shared_input
        self.shared_input = leaders = {name: shared.get(name, name) for name in self.family.sites(self.model)}
        specs = {name: layer_spec(name, self.family.placement(name)) for name in sites}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.layers: dict[str, StudentLayer] = {}
        for name, layer in sites.items():
            quantizer = self._quantizer(leaders[name], specs[name], specs[leaders[name]], name).to(device) if specs[name].act_bits else None
            self.layers[name] = StudentLayer(layer, specs[name], quantizer).to(device)
            _replace(self.model, name, self.layers[name])
        scales = each_in_a_thread(lambda name: weight_scale(self.layers[name].layer.weight, specs[name].weight_bits), sites)
        for name, scale in zip(sites, scales, strict=True):
            self.layers[name].set_weight_scale(scale)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Prediction, [B, ...] in the compute dtype."""
        with self.at_rows(table_rows(self.row_of_timestep, inputs["timestep"]), inputs[SAMPLE].device):
            return self.family.prediction(self.config, self.family.forward(self.model, inputs))

    @contextmanager
    def at_rows(self, rows: Tensor, device: torch.device) -> Iterator[None]:
        """Within it the layers quantize by these table rows, int64 [B], and compute in the student's dtype: for whoever runs a part of the model."""
        relaxed = None if self.relaxed_rows is None else self.relaxed_rows.to(rows.device)[rows]
        shared = rows if self.shared_row is None else self.shared_row.to(rows.device)[rows].long()
        for quantizer in self.quantizers.values():
            quantizer.current, quantizer.relaxed = shared, relaxed if relaxed is not None and bool(relaxed.any()) else None
        try:
            with torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
                yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.forget()

    def shared_input_layers(self, name: str) -> tuple[str, ...]:
        """The layers that are fed the very same tensor as `name`, itself among them, in the model's order."""
        return tuple(other for other in self.layers if self.shared_input[other] == self.shared_input[name])

    def set_pre_scale(self, name: str, scale: Tensor | None) -> None:
        """Scale the input of `name`, and of its siblings, channel by channel: float32 [Cin], each > 0; None takes an earlier one away.

        The function stays what it was: weights are divided by what inputs are multiplied by. Weight scales and tables are the caller's to set anew.
        """
        for sibling in self.shared_input_layers(name):
            self.layers[sibling].set_pre_scale(scale)

    def allocate_for_state(self, names: Iterable[str]) -> None:
        """Give layers the pre-scales and channel bits that a state of these parameter names holds, for it to be loaded."""
        held = set(names)
        for name, layer in self.layers.items():
            if f"model.{name}.layer.{PRE_SCALE}" in held and layer.pre_scale is None:
                layer.set_pre_scale(torch.ones(layer.layer.weight.shape[1]))
            if f"model.{name}.channel_bits" in held and layer.channel_bits is None:
                layer.set_channel_bits(torch.full_like(layer.log_weight_scale, layer.bits))

    @property
    def structure(self) -> NetworkRewrite:
        """What the student's network computes otherwise than the published one."""
        scaled = tuple(name for name, layer in self.layers.items() if layer.pre_scale is not None)
        return NetworkRewrite(self.segments, scaled)

    def learnable(self) -> dict[str, nn.Parameter]:
        """Every parameter that calibration or training sets, by name, each once."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def checkpoint_parameters(self) -> dict[str, nn.Parameter]:
        """What `learnable` gives before a rate of 0 fixes some of it: all that a checkpoint must hold."""
        kept = {id(layer.layer.weight) for layer in self.layers.values()}
        own = {id(parameter) for layer in self.layers.values() for parameter in layer.parameters()} - kept | {id(self.shared_row)}
        return {name: value for name, value in self.named_parameters() if id(value) in own}

    def _quantizer(self, leader: str, spec: LayerSpec, leading_spec: LayerSpec, name: str) -> ActivationQuantizer:
        key = leader if (spec.act_bits, spec.symmetric) == (leading_spec.act_bits, leading_spec.symmetric) else name
        if key not in self.quantizers:
            self.quantizers[key] = ActivationQuantizer(spec, len(self.timesteps))
        return self.quantizers[key]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)

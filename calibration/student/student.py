"""The student: the fake-quantized copy of a float model that is calibrated and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.run.parallel_map import parallel_map
from calibration.student.fake_quant import FakeQuantize
from calibration.student.layers import ActivationQuantizer, StudentLayer
from calibration.student.quantization_spec import LayerSpec
from calibration.student.teacher import Teacher, share_weights
from edm_deploy.network.family import SAMPLE
from edm_deploy.network.layer_costs import model_work
from edm_deploy.network.low_rank_branch import BASE, BranchedLayer, LowRankBranch
from edm_deploy.network.placement import Placement
from edm_deploy.network.restructure import PRE_SCALE, PUBLISHED, NetworkRewrite, replace_module
from edm_deploy.numerics.activation_table import nearest_rows, table_rows
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.pipelines.source import Source


class Student(nn.Module):
    """The fake-quantized model: graph inputs by name to prediction; each sample is quantized by the table row of its timestep.

    Args:
        source: Its model is not changed.
        layer_spec: Bit widths of a layer by its name and its family's placement, as `Recipe.layer_spec`.
        weight_scale: Scale of each output channel by weight and bits, as `Recipe.weight_scale`.
        timesteps: int32 [R] ascending, one per table row.
        device: Device of the student.
        folded: Sites that stay in floating point, because exporters replace their output by a table.
        structure: How the source's model was rewritten already; without pre-scales, which are set on the student.
        teacher: Its float weights on `device` are shared with the student; None shares those of the source.

    Attributes:
        layers: Every quantized layer by site name.
        quantizers: Every activation quantizer by the name of the first site that uses it.
        shared_input: For each site the first site that receives the same tensor.
        branches: Float branches by published layer, or part of one, with parameters of their own.
        relaxed: uint8 [num_train_timesteps], 1 where inputs have more bits, set by `relax`; None if there are no such timesteps.
        relaxed_bits: Their bits there: 8, or 16 for floating point.
        specs: Bit widths of every quantized layer by site name.
        channels_last: Whether feature maps have this layout: faster in bfloat16, where the kernels of norms are made for it.
        shared_row: int32 [R], for each row the row whose values it uses; None if each uses its own.
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
        structure: NetworkRewrite = PUBLISHED,
    ) -> None:
        super().__init__()
        self.family, self.config = source.family_object, source.config
        self.model = share_weights(teacher.model if teacher else source.model, device)
        self.timesteps = timesteps
        self.row_of_timestep = nearest_rows(timesteps, source.num_train_timesteps)
        self.compute_dtype = torch.float32
        self.folded, self.channels_last = folded, False
        self.relaxed: Tensor | None = None
        self.relaxed_bits = WEIGHT_ONLY_BITS
        self.shared_row: nn.Parameter | None = None  # a parameter, so that checkpoints contain it
        self.source_structure = structure
        shared = model_work(self.family, self.config, structure).shared_input
        self.shared_input = {name: shared.get(name, name) for name in self.family.sites(self.model)}
        sites = {name: layer for name, layer in self.family.sites(self.model).items() if name not in folded}
        self.specs = specs = {name: layer_spec(name, self.family.placement(name)) for name in sites}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.layers: dict[str, StudentLayer] = {}
        for name, layer in sites.items():
            quantizer = self._quantizer(name, specs).to(device) if specs[name].act_bits else None
            self.layers[name] = StudentLayer(layer, specs[name], quantizer).to(device)
            replace_module(self.model, name, self.layers[name])
        scales = parallel_map(lambda name: weight_scale(self.layers[name].layer.weight, specs[name].weight_bits), sites)
        for name, scale in zip(sites, scales, strict=True):
            self.layers[name].set_weight_scale(scale)
        self.branches: dict[str, LowRankBranch] = {name: new_branch(self.model, name, rank) for name, rank in structure.branches.items()}

    def _quantizer(self, name: str, specs: Mapping[str, LayerSpec]) -> ActivationQuantizer:
        """The quantizer of the first site with the same input, or a separate one if the two sites' specs differ."""
        first, spec = self.shared_input[name], specs[name]
        key = first if (spec.act_bits, spec.symmetric) == (specs[first].act_bits, specs[first].symmetric) else name
        if key not in self.quantizers:
            self.quantizers[key] = ActivationQuantizer(spec, len(self.timesteps))
        return self.quantizers[key]

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Prediction, [B, ...] in the compute dtype."""
        if self.channels_last and inputs[SAMPLE].ndim == 4:  # every convolution passes its layout on
            inputs = {**inputs, SAMPLE: inputs[SAMPLE].contiguous(memory_format=torch.channels_last)}
        with self.at_rows(table_rows(self.row_of_timestep, inputs["timestep"]), inputs[SAMPLE].device):
            return self.family.prediction(self.config, self.family.forward(self.model, inputs))

    @contextmanager
    def at_rows(self, rows: Tensor, device: torch.device) -> Iterator[None]:
        """Quantize by these table rows, int64 [B], and compute in the student's dtype: for a forward pass of the model or of a part of it."""
        relaxed = None if self.relaxed is None else self.relaxed[self.timesteps.long()].bool().to(rows.device)[rows]
        if relaxed is not None and not bool(relaxed.any()):
            relaxed = None
        shared = rows if self.shared_row is None else self.shared_row.to(rows.device)[rows].long()
        for quantizer in self.quantizers.values():
            changes = (
                self.relaxed_bits == WEIGHT_ONLY_BITS or quantizer.relaxed is not None
            )  # sites that have 8 bits anyway keep their table
            quantizer.set_samples(shared, relaxed if changes else None)
        try:
            with torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
                yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.clear_cache()

    def quantize_by(self, function: FakeQuantize) -> None:
        """Quantize weights and inputs by this function, which computes what `fake_quantize` does."""
        for layer in self.layers.values():
            layer.fake_quantize = function
        for quantizer in self.quantizers.values():
            for table in quantizer.tables:
                table.fake_quantize = function

    def relax(self, timesteps: Tensor, bits: int) -> None:
        """Quantize inputs to 8 bits at some timesteps, by tables that calibration sets from the same observations, or not at all there.

        Args:
            timesteps: uint8 [num_train_timesteps], 1 where inputs are relaxed.
            bits: 8, or 16 for floating point.
        """
        self.relaxed, self.relaxed_bits = timesteps, bits
        if bits != WEIGHT_ONLY_BITS:
            self.add_wide_tables(bits)

    def add_wide_tables(self, bits: int) -> None:
        """Give each quantizer of fewer bits a table of `bits` bits beside its own; calibration sets both from the same observations."""
        for name, quantizer in self.quantizers.items():
            if quantizer.bits < bits:
                spec = LayerSpec(self.specs[name].weight_bits, bits, symmetric=True)
                quantizer.relaxed = ActivationQuantizer(spec, len(self.timesteps)).to(quantizer.log_scale.device)

    def shared_input_layers(self, name: str) -> tuple[str, ...]:
        """The layers that receive the same tensor as `name`, including itself, in the model's order."""
        return tuple(other for other in self.layers if self.shared_input[other] == self.shared_input[name])

    def set_pre_scale(self, name: str, scale: Tensor | None) -> None:
        """Multiply the input of `name`, and of the layers that share it, by `scale`, float32 [Cin] > 0, and divide their weights; None removes it.

        The float function does not change. The caller sets weight scales and tables anew.
        """
        for layer in self.shared_input_layers(name):
            self.layers[layer].set_pre_scale(scale)

    def branch_of(self, site: str) -> LowRankBranch | None:
        """The float branch on the input of a site, or None."""
        return self.branches.get(site.removesuffix(f".{BASE}"))

    def allocate_for_state(self, names: Iterable[str]) -> None:
        """Add the pre-scales and per-channel bits that occur among the parameter names of a saved state, so that it can be loaded."""
        saved = set(names)
        for name, layer in self.layers.items():
            if f"model.{name}.layer.{PRE_SCALE}" in saved and layer.pre_scale is None:
                layer.set_pre_scale(torch.ones(layer.layer.weight.shape[1]))
            if f"model.{name}.channel_bits" in saved and layer.channel_bits is None:
                layer.set_channel_bits(torch.full_like(layer.log_weight_scale, layer.bits))

    @property
    def structure(self) -> NetworkRewrite:
        """How the student's network differs from the published one, pre-scales included."""
        scaled = tuple(name for name, layer in self.layers.items() if layer.pre_scale is not None)
        return replace(self.source_structure, pre_scaled=scaled)

    def learnable(self) -> dict[str, nn.Parameter]:
        """Every parameter that calibration or training sets, by name, each once."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def checkpoint_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that a checkpoint contains: those of `learnable` before rates of 0 fix some of them, and integer ones."""
        weights = {id(layer.layer.weight) for layer in self.layers.values()}
        modules: list[nn.Module] = [*self.layers.values(), *self.branches.values()]
        saved = {id(parameter) for module in modules for parameter in module.parameters()} - weights | {id(self.shared_row)}
        return {name: value for name, value in self.named_parameters() if id(value) in saved}


def new_branch(model: nn.Module, name: str, rank: int) -> LowRankBranch:
    """Give a layer a branch with learnable parameters, which is 0 initially and shares none with the teacher or the source."""
    layer = model.get_submodule(name)
    assert isinstance(layer, BranchedLayer)  # as the network was rewritten
    base = layer.base.layer if isinstance(layer.base, StudentLayer) else layer.base
    layer.branch = LowRankBranch(base, rank).requires_grad_()  # type: ignore[arg-type]  # a Conv2d or Linear
    return layer.branch


@contextmanager
def activations_unquantized(student: Student) -> Iterator[None]:
    """Within the context no activation of the student is quantized."""
    quantizers = {name: layer.quantizer for name, layer in student.layers.items()}
    for layer in student.layers.values():
        layer.quantizer = None
    try:
        yield
    finally:
        for name, layer in student.layers.items():
            layer.quantizer = quantizers[name]

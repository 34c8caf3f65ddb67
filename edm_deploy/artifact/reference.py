"""The reference executor: an artifact in plain torch with exact integer sums. Every backend is compared with it, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.relaxed_timesteps import quantized_graph, relaxed_graph
from edm_deploy.artifact.timestep_correction import DenoiseFn
from edm_deploy.artifact.timestep_routing import route_by_timestep
from edm_deploy.network.adapter_inputs import SLOT_SCALES, branch, down_input, up_input
from edm_deploy.network.restructure import PRE_SCALE, replace_module, site_input
from edm_deploy.numerics.activation_table import ActivationTable, per_sample, quantize_activation, table_rows
from edm_deploy.numerics.codes import dequantize_weight, per_channel

ROWS_SUMMED_AT_ONCE = 128


@dataclass(frozen=True)
class SiteRecord:
    """Input, codes and output of one site in one forward pass.

    Attributes:
        x: float32, the site's input before quantization, after its pre-scale and rotation if it has them.
        codes: float32 holding integers, the shape of `x`; the input itself where the site is weight-only.
        y: float32, the site's output, bias and adapter branch included.
    """

    x: Tensor
    codes: Tensor
    y: Tensor


class ReferenceSite(nn.Module):
    """A quantized Conv2d or Linear: `y = s_x[row] * s_w[o] * conv(n_x, n_w) + bias`.

    Integers are summed in a floating-point type wide enough that every partial sum is exact.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, site: QuantizedLayer, bias: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.site = site
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.bias = bias
        self.record: SiteRecord | None = None
        self.recording = False
        self.adapter: tuple[Tensor, Tensor] | None = None  # down and up
        self.slot_scales = torch.zeros(0, 0)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Output float32 for the layer's input [B, ...]; `rows` must hold the table row of each sample."""
        return self.quantized(site_input(self.layer, x))

    def quantized(self, x: Tensor) -> Tensor:
        """Output float32 for the site's input [B, ...] after its pre-scale and rotation."""
        table = self.site.activation
        if table is None:
            y = self._sum(x, dequantize_weight(self.site.codes, self.site.weight_scale))
            codes = x
        else:
            codes = quantize_activation(x.float(), table, self.rows)
            exact = exact_dtype(table, self.site.codes)
            total = self._sum(codes.to(exact), self.site.codes.to(exact)).double()
            weight_scale = self._per_output(self.site.weight_scale, total).double()
            y = (total * weight_scale * per_sample(table.scale, self.rows, total).double()).float()
        if self.bias is not None:
            y = y + self._per_output(self.bias, y)
        if self.adapter is not None:
            y = y + branch(self.layer, x.float(), *self.adapter, self.slot_scales)
        if self.recording:
            self.record = SiteRecord(x.float().clone(), codes.float(), y.clone())
        return y

    def _per_output(self, values: Tensor, y: Tensor) -> Tensor:
        """`values` [Cout] broadcast over `y`, whose channel axis is the last after a Linear and 1 after a convolution."""
        return values if isinstance(self.layer, nn.Linear) else per_channel(values, y[0])

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight)
        layer = self.layer
        return functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


class Reference(nn.Module):
    """An artifact as a denoiser: prediction from graph inputs by name. Each sample of a batch may have another timestep.

    Args:
        artifact: A valid artifact.
        adapters: float32, weights of adapter branches by graph input (`edm_deploy.network.adapter_inputs`). With any, the graph inputs of a call
            include `lora.scale`.
    """

    def __init__(self, artifact: Artifact, adapters: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.artifact = artifact
        self.family = artifact.family_object
        model = artifact.skeleton()
        layers = self.family.sites(model)
        self.sites: dict[str, ReferenceSite] = {}
        for name, site in artifact.sites.items():
            if (scale := artifact.params.get(f"{name}.{PRE_SCALE}")) is not None:
                layers[name].register_parameter(PRE_SCALE, nn.Parameter(scale, requires_grad=False))
            self.sites[name] = ReferenceSite(layers[name], site, artifact.params.get(f"{name}.bias"))
            if adapters and down_input(name) in adapters:
                self.sites[name].adapter = adapters[down_input(name)], adapters[up_input(name)]
            replace_module(model, name, self.sites[name])
        state = {key: value for key, value in artifact.params.items() if key.removesuffix(".bias") not in self.sites}
        model.load_state_dict(state, assign=True, strict=False)
        self.model = model.eval()

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Prediction, float32 [B, C, H, W], for graph inputs by name; `timestep` is float32 [B]."""
        rows = table_rows(self.artifact.row_of_timestep, inputs["timestep"])
        for site in self.sites.values():
            site.rows = rows
            site.slot_scales = inputs.get(SLOT_SCALES, site.slot_scales)
        return self.family.forward(self.model, {name: value for name, value in inputs.items() if name != SLOT_SCALES})

    def record(self, inputs: Mapping[str, Tensor]) -> dict[str, SiteRecord]:
        """Input, codes and output of each site for these inputs, by site name."""
        for site in self.sites.values():
            site.recording = True
        try:
            self(inputs)
        finally:
            for site in self.sites.values():
                site.recording = False
        return self._records()

    @torch.no_grad()
    def at_sites(self, x: Mapping[str, Tensor], timestep: Tensor, slot_scales: Tensor | None = None) -> dict[str, SiteRecord]:
        """Codes and output of each site for a given input, without the network between the sites.

        Args:
            x: float32, by site name.
            timestep: float32 [B].
            slot_scales: float32 [B, R], of the adapters, where there are any.
        """
        rows = table_rows(self.artifact.row_of_timestep, timestep)
        for name, value in x.items():
            site = self.sites[name]
            site.rows, site.recording = rows, True
            site.slot_scales = site.slot_scales if slot_scales is None else slot_scales
            site.quantized(value)
            site.recording = False
        return self._records()

    def _records(self) -> dict[str, SiteRecord]:
        records = {name: site.record for name, site in self.sites.items() if site.record is not None}
        for site in self.sites.values():
            site.record = None
        return records


def exact_dtype(table: ActivationTable, codes: Tensor) -> torch.dtype:
    """float32 where every partial sum of products stays below 2^24 and so is exact, float64 (2^53) otherwise.

    Args:
        table: Bounds the activation codes.
        codes: int8 [Cout, ...], the weight codes; one output sums over all axes but the first.
    """
    largest = max(abs(int(table.qmin.min())), int(table.qmax.max()))
    # A block of rows at a time: the sum first widens every code to four bytes, which is gigabytes for real models. No code is -128.
    heaviest_row = max(int(rows.abs().sum(dim=1, dtype=torch.int32).max()) for rows in torch.split(codes.flatten(1), ROWS_SUMMED_AT_ONCE))
    return torch.float32 if largest * heaviest_row < 2**24 else torch.float64


def reference_with_correction(artifact: Artifact) -> DenoiseFn:
    """An artifact as the runtime computes it, by the reference executor: both graphs where it has two, and its correction."""
    runs: list[DenoiseFn] = [Reference(quantized_graph(artifact))]
    if artifact.relaxed is not None:
        runs.append(Reference(relaxed_graph(artifact)))
    run = route_by_timestep(runs, artifact.relaxed)
    return run if artifact.correction is None else artifact.correction.around(run)

"""Layers of the student: a Conv2d or Linear whose weight and input are fake-quantized with learnable parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.student.fake_quant import FakeQuantize, fake_quantize, round_straight_through
from calibration.student.quantization_spec import LayerSpec, QuantRange
from edm_deploy.network.restructure import PRE_SCALE, representable, site_input, site_weight
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import channel_bounds, dequantize_weight, per_channel, quantize_weight, weight_bounds


class ActivationQuantizer(nn.Module):
    """Quantizes an activation by a table with one row per calibrated timestep; each sample of a batch has its own row.

    Scales are stored as logarithms, so that they stay above 0 and learning rates are relative. The lowest code is rounded during training with a
    straight-through gradient, so that bounds are integers from the first step.

    Args:
        spec: Bits and symmetry.
        rows: Rows of the table.

    Attributes:
        spec: Bits and symmetry.
        log_scale: float32 [R].
        qmin: float32 [R], the lowest code before rounding; learnable unless the spec is symmetric.
        relaxed: Quantizer with more bits for samples at relaxed rows; None if these stay in floating point, or if there are none.
        rows: int64 [B], the row of each sample; set before each forward pass by `Student.at_rows`.
        relaxed_samples: bool [B], samples at relaxed rows, set likewise; None if there are none.
        fake_quantize: The function that quantizes; another one computes the same in another way.
    """

    def __init__(self, spec: LayerSpec, rows: int) -> None:
        super().__init__()
        assert spec.act_bits is not None  # a weight-only site has no quantizer
        self.spec, self.bits, self.levels = spec, spec.act_bits, spec.levels
        self.log_scale = nn.Parameter(torch.zeros(rows))
        fixed = spec.fixed_qmin
        self.qmin = nn.Parameter(torch.full((rows,), float(fixed or 0)), requires_grad=fixed is None)
        self.relaxed: ActivationQuantizer | None = None
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.relaxed_samples: Tensor | None = None
        self.fake_quantize: FakeQuantize = fake_quantize
        self._cache: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def set_row(self, row: int | slice, range_: QuantRange) -> None:
        """Set one row of the table, or several."""
        self.log_scale[row] = math.log(range_.scale)
        self.qmin[row] = range_.qmin

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, ...] quantized and dequantized, in its own dtype. Layers that receive the same tensor get the same result."""
        if self._cache is None or self._cache[0] is not x:
            self._cache = x, self._quantize_all(x)
        return self._cache[1]

    def _quantize_all(self, x: Tensor) -> Tensor:
        if self.relaxed_samples is None:
            return self._quantize(x)
        relaxed = x if self.relaxed is None else self.relaxed(x)
        if bool(self.relaxed_samples.all()):
            return relaxed
        return torch.where(per_channel(self.relaxed_samples, x), relaxed, self._quantize(x))

    def _quantize(self, x: Tensor) -> Tensor:
        qmin = round_straight_through(self.qmin.clamp(-self.levels, 0))
        return self.fake_quantize(x, self.log_scale.exp()[self.rows], qmin[self.rows], self.levels)

    def set_samples(self, rows: Tensor, relaxed_samples: Tensor | None) -> None:
        """Set `rows` and `relaxed_samples` for a forward pass."""
        self.rows, self.relaxed_samples = rows, relaxed_samples
        if self.relaxed is not None:
            self.relaxed.set_samples(rows, None)

    @property
    def tables(self) -> list[ActivationQuantizer]:
        """The quantizer itself, and the one for relaxed rows if there is one."""
        return [self] if self.relaxed is None else [self, self.relaxed]

    def clear_cache(self) -> None:
        """Drop the cached input and result, which would otherwise be kept until the next forward pass."""
        self._cache = None
        if self.relaxed is not None:
            self.relaxed.clear_cache()

    @torch.no_grad()
    def table(self) -> ActivationTable:
        """The table as artifacts store it."""
        qmin = self.qmin.clamp(-self.levels, 0).round()
        scale, lowest, highest = self.log_scale.exp().cpu(), qmin.to(torch.int8).cpu(), (qmin + self.levels).to(torch.int8).cpu()
        return ActivationTable(bits=self.bits, scale=scale, qmin=lowest, qmax=highest)


class StudentLayer(nn.Module):
    """A quantized Conv2d or Linear: `y = conv(Q(p x), Q(W / p + B @ A)) + bias`. The low-rank update is merged before rounding (QALoRA).

    The pre-scale `p` by input channel is a parameter of the layer itself, as in `edm_deploy.network.restructure`, and exists only if it was set. Where that module
    rotated the layer, `W` is rotated, and so is `p x` before it is quantized.

    Args:
        layer: The float layer; its weight is not changed.
        spec: Bits of its weight.
        quantizer: Quantizer of its input, shared by the layers that receive the same tensor; None leaves the input in floating point.

    Attributes:
        bits: Bits of the weight codes.
        channel_bits: uint8 [Cout] if bits differ by output channel, else None.
        log_weight_scale: float32 [Cout].
        lora_a: float32 [rank, Cin * kernel]; lora_b: float32 [Cout, rank]. None before `add_update`.
        rounding: Module that returns the quantized weight, float32, while its rounding is learned; None rounds to nearest.
        fake_quantize: As that of ActivationQuantizer, for the weight.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, spec: LayerSpec, quantizer: ActivationQuantizer | None) -> None:
        super().__init__()
        self.layer, self.quantizer = layer, quantizer
        self.bits = spec.weight_bits
        self.channel_bits: nn.Parameter | None = None
        self.log_weight_scale = nn.Parameter(torch.zeros(layer.weight.shape[0]))
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.rounding: nn.Module | None = None
        self.fake_quantize: FakeQuantize = fake_quantize

    @torch.no_grad()
    def set_weight_scale(self, scale: Tensor) -> None:
        """Set the scale of each output channel, float32 [Cout]."""
        self.log_weight_scale.copy_(scale.log())

    def set_channel_bits(self, bits: Tensor | None) -> None:
        """Set the bits of each output channel, any integer dtype [Cout]; None restores the same bits for all."""
        # A parameter, so that checkpoints contain it.
        self.channel_bits = None if bits is None else nn.Parameter(bits.to(self.log_weight_scale.device, torch.uint8), requires_grad=False)

    def set_pre_scale(self, scale: Tensor | None) -> None:
        """Multiply the input by `scale`, float32 [Cin] > 0, rounded to values that float16 represents, and divide the weight by it; None removes it."""
        value = None if scale is None else nn.Parameter(representable(scale).to(self.layer.weight.device), requires_grad=False)
        self.layer.register_parameter(PRE_SCALE, value)

    @property
    def pre_scale(self) -> Tensor | None:
        """float32 [Cin], or None."""
        pre_scale: Tensor | None = getattr(self.layer, PRE_SCALE, None)
        return pre_scale

    @torch.no_grad()
    def correct_bias(self, mean_input: Tensor) -> None:
        """Add to the bias the mean output error that rounding the weight causes; a layer without a bias is not changed.

        Args:
            mean_input: float32 [Cin], mean of each input channel, after the pre-scale if there is one.

        Source: Nagel et al., Data-Free Quantization, arXiv 1906.04721, section 4.2, with measured means.
        """
        if self.layer.bias is None:
            return
        codes, scale = self.codes()
        error = self.merged_weight() - dequantize_weight(codes, scale)
        groups = self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1
        means = mean_input.to(error.device).reshape(groups, -1).repeat_interleave(error.shape[0] // groups, dim=0)
        # A new parameter: the old one may be shared with the teacher.
        corrected = self.layer.bias.float() + (error.reshape(*error.shape[:2], -1).sum(2) * means).sum(1)
        self.layer.bias = nn.Parameter(corrected, requires_grad=False)

    def add_update(self, rank: int, generator: torch.Generator) -> None:
        """Add a low-rank update that is zero initially: A uniform in +-1/sqrt(fan in), B zero.

        Source: LoRA, arXiv 2106.09685; the released code's kaiming_uniform(a=sqrt(5)).
        """
        weight = self.layer.weight
        fan_in = weight[0].numel()
        rank = min(rank, weight.shape[0], fan_in)
        a = (torch.rand(rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)
        self.lora_a = nn.Parameter(a.to(weight.device))
        self.lora_b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def merged_weight(self) -> Tensor:
        """`W / p + B @ A`: float32, the shape of the layer's weight."""
        weight = site_weight(self.layer, self.layer.weight.float())
        if self.lora_a is None or self.lora_b is None:
            return weight
        return torch.addmm(weight.flatten(1), self.lora_b, self.lora_a).view_as(weight)

    def rounded_weight(self) -> Tensor:
        """The quantized weight that the layer computes with: float32, the shape of the layer's weight."""
        if self.rounding is not None:
            learned: Tensor = self.rounding()
            return learned
        return self.nearest_weight()

    def nearest_weight(self) -> Tensor:
        """The weight rounded to the nearest codes and dequantized: float32, the shape of the layer's weight."""
        lowest, highest = self.code_bounds()
        levels = weight_bounds(self.bits)[1] - weight_bounds(self.bits)[0] if self.channel_bits is None else highest - lowest
        return self.fake_quantize(self.merged_weight(), self.log_weight_scale.exp(), lowest, levels)

    def code_bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight code of each output channel, float32 [Cout] each."""
        if self.channel_bits is not None:
            return channel_bounds(self.channel_bits)
        qmin, qmax = weight_bounds(self.bits)
        return torch.full_like(self.log_weight_scale, qmin), torch.full_like(self.log_weight_scale, qmax)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Output of the layer. Under autocast, input, weight and bias are cast to its dtype; scales and rounding stay float32."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            weight = self.rounded_weight().to(x.dtype)
            bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
            x = site_input(self.layer, x)
            x = x if self.quantizer is None else self.quantizer(x)
            if isinstance(self.layer, nn.Linear):
                return functional.linear(x, weight, bias)
            layer = self.layer
            return functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Weight codes, int8 in the shape of the weight, and their scale, float32 [Cout]."""
        scale = self.log_weight_scale.exp()
        bits = self.bits if self.channel_bits is None else self.channel_bits
        return quantize_weight(self.merged_weight(), scale, bits), scale

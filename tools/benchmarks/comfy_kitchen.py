"""comfy-kitchen's low-bit linear layers beside ours, where it is installed (`pip install comfy-kitchen`): both quantize their input in the call.

Source: comfy_kitchen 0.2.40, `int8_linear` (W8A8, one scale for the weight, one for each token) and `convrot_w4a4_linear` (W4A4, groups of 256 inputs rotated).
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from edm_deploy_tools.benchmarks.kernel_problems import Call
from edm_deploy_tools.benchmarks.layer_shapes import Layer

PACKAGE = "comfy_kitchen"
ROTATED = 256  # inputs of a group that its W4A4 rotates: a layer must have a multiple of them


def comfy_kitchen_calls(layer: Layer, batch: int, device: torch.device) -> dict[str, Call]:
    """Calls of its linear layers at the sizes of a layer, by what they are; none of a convolution, nor where the package is not installed."""
    if layer.op != "linear" or importlib.util.find_spec(PACKAGE) is None:
        return {}
    kitchen = importlib.import_module(PACKAGE)
    x, weight = torch.randn(batch, layer.H, layer.C, device=device).half(), torch.randn(layer.K, layer.C, device=device).half()
    bias = torch.randn(layer.K, device=device).half()
    codes, scale = kitchen.quantize_int8_tensorwise(weight)
    calls: dict[str, Call] = {"W8A8": lambda: kitchen.int8_linear(x, codes, scale, bias=bias, out_dtype=torch.float16)}
    if layer.C % ROTATED == 0:
        packed, scales = kitchen.quantize_convrot_w4a4_weight(weight)
        calls["W4A4"] = lambda: kitchen.convrot_w4a4_linear(x, packed, scales, bias=bias)
    return calls

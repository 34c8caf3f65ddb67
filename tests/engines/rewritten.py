"""Small layers by hand and whole tiny models, rewritten for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import quantize_weight, weight_bounds
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.capabilities import code_format
from engines.torch_graph.packed_layer import PackedLayer, layer_from_tensors, tensors_from_layer
from engines.torch_graph.rewrite import GraphRewrite, rewrite_layers
from tests.conftest import tiny_model
from tests.shared_traces import shared_program

ROW_OF_TIMESTEP = torch.arange(1000, dtype=torch.int32) // 500  # two rows


def packed_site(
    site: QuantizedLayer, bias: Tensor | None = None, dtype: torch.dtype = torch.float16, kind: CodeFormat | str | None = "own"
) -> PackedLayer:
    """A site as an engine would open it; `kind` s8 widens, None leaves it to floating point."""
    own = code_format(site)
    run: CodeFormat | None = own if kind == "own" else kind  # type: ignore[assignment]
    packed = None if run is None else own
    tensors = tensors_from_layer("site", site, packed)
    return layer_from_tensors("site", tensors, packed=packed, kind=run, weight_shape=tuple(site.codes.shape), bias=bias, dtype=dtype)


def site_of(layer: nn.Conv2d | nn.Linear, bits: int = 4, low: int = -4, scale: float = 0.2) -> QuantizedLayer:
    """A layer quantized to `bits`, its input to [low, low + 2^bits - 1], the second row's scale twice the first's."""
    weight = layer.weight.detach().float()  # a model that was exported in float16 stays so
    weight_scale = weight.flatten(1).abs().amax(1) / weight_bounds(bits)[1]
    qmin = torch.full((2,), low, dtype=torch.int8)
    table = ActivationTable(bits=bits, scale=torch.tensor([scale, 2 * scale]), qmin=qmin, qmax=qmin + (2**bits - 1))
    return QuantizedLayer(
        op="conv2d" if weight.ndim == 4 else "linear",
        codes=quantize_weight(weight, weight_scale, bits),
        weight_scale=weight_scale,
        weight_bits=bits,
        activation=table,
    )


def drafted(
    model: nn.Module, sites: dict[str, QuantizedLayer], x: Tensor, *, kinds: dict[str, CodeFormat | None] | None = None
) -> GraphRewrite:
    """A model `f(x)` in float16 with its sites rewritten; graph inputs are x, of any batch, and the timestep."""
    wrapped = _Timed(model.half())
    arguments = (x, torch.zeros(len(x)))
    batch = torch.export.Dim("batch")
    program = torch.export.export(wrapped.eval(), arguments, dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    state = {name: value.float() for name, value in model.state_dict().items()}
    packed = {name: packed_site(site, state.get(f"{name}.bias"), kind=(kinds or {}).get(name, "own")) for name, site in sites.items()}
    params = {name: value for name, value in state.items() if name.removesuffix(".weight") not in sites}
    params |= {f"{name}.weight": site.weight for name, site in packed.items() if site.kind is None}
    return rewrite_layers(program, packed, params, ROW_OF_TIMESTEP, torch.float16)


def program_of(kind: str, dtype: torch.dtype = torch.float16) -> ExportedProgram:
    """The float program of a tiny model, traced once for all tests."""
    family, config, _ = tiny_model(kind)
    return shared_program(family, config, dtype, input_dtype=torch.float32)


def drafted_artifact(
    artifact: Artifact, program: ExportedProgram, dtype: torch.dtype = torch.float16, kind: CodeFormat | str | None = "own"
) -> GraphRewrite:
    """A whole denoiser, rewritten and not fused; `kind` as of `packed_site`."""
    packed = {name: packed_site(site, artifact.params.get(f"{name}.bias"), dtype, kind) for name, site in artifact.sites.items()}
    return rewrite_layers(program, packed, artifact.params, artifact.row_of_timestep, dtype)


def calls(graph: torch.fx.Graph, name: str) -> int:
    """How many nodes call the operator of this name."""
    return sum(node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] == name for node in graph.nodes)


class _Timed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.model(x)

"""A published architecture's graphs at one batch size, on the meta device: as our session runs it, and in floating point. For expected times of a whole step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edm_deploy.network.family import Config, Family
from edm_deploy.network.float_program import exported_program
from edm_deploy.network.low_rank_branch import in_branch, largest_rank
from edm_deploy.network.meta_model import meta_inputs, meta_model
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite, layer_of
from edm_deploy.numerics.kernel_layout import CodeFormat, bits_of, code_bytes
from edm_deploy_tools.common import console
from edm_deploy_tools.common.console import Row
from engines.performance.gpus import Gpu
from engines.performance.step_time import step_time
from engines.torch_graph import fusions
from engines.torch_graph.attention import attention_in_int8
from engines.torch_graph.packed_layer import PackedLayer
from engines.torch_graph.rewrite import rewrite_layers

META = torch.device("meta")
STEP_NOTE = (
    "Expected, not measured; nothing of the pipeline around the denoiser. engines/profiles/measured.toml compares this model with published times of whole steps: "
    "within 10 % on an RTX 3090, up to half too fast on an A100."
)


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """A model's float program, traced once for all graphs that are made of it.

    Attributes:
        family, config: The model.
        program: Its float16 program.
        structure: Rewrites of its network.
    """

    family: Family
    config: Config
    program: ExportedProgram
    structure: NetworkRewrite = PUBLISHED

    @classmethod
    def of(cls, family: Family, config: Config, structure: NetworkRewrite = PUBLISHED) -> TracedModel:
        """Trace a model; it takes a minute for one of a thousand layers."""
        program = exported_program(family, config, torch.float16, structure=structure)
        return cls(family=family, config=config, program=program, structure=structure)

    def with_branches(self, rank: int) -> TracedModel:
        """The model traced again, with a float branch of this rank beside every linear layer that the family quantizes."""
        layers = self.family.sites(meta_model(self.family, self.config))
        linear = {
            name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear) and self.family.placement(name) == "quantize"
        }
        branches = {name: min(rank, largest_rank(layer)) for name, layer in linear.items()}
        return TracedModel.of(self.family, self.config, NetworkRewrite(branches=branches))

    def graph(self, kinds: Mapping[str, CodeFormat], *, int8_attention: bool = False, branches: bool = True) -> fx.GraphModule:
        """The fused graph with the sites of `kinds` in integers, on the meta device; without sites the float model.

        Args:
            kinds: Code format of each quantized layer. One table of one row for all, so that layers that read one value share its codes.
            int8_attention: Whether attention is ours where the kernels have it.
            branches: Whether float branches are computed by the kernels.
        """
        model = meta_model(self.family, self.config, self.structure)
        layers = self.family.sites(model)
        sites = {name: _stand_in(layers[name], kind) for name, kind in kinds.items()}
        params = {name: value for name, value in model.state_dict().items() if name.removesuffix(".weight") not in sites}
        rows = torch.zeros(1000, dtype=torch.int32, device=META)
        rewritten = rewrite_layers(self.program, sites, params, rows, torch.float16)
        if kinds:  # the float model is what torch compiles by itself
            fusions.fuse(rewritten, branches=branches)
        if int8_attention:
            attention_in_int8(rewritten)
        rewritten.tensors = {name: _channels_last(value.to(META)) for name, value in rewritten.tensors.items()}
        return rewritten.module()

    def inputs(self, batch: int) -> list[Tensor]:
        """The graph's inputs for `batch` samples at the model's sample size, on the meta device."""
        one = meta_inputs(self.family, self.config)
        inputs = []
        for declared in self.family.inputs(self.config):
            value = one[declared.name]
            shape = [batch if dim == "batch" else size for dim, size in zip(declared.dims, value.shape, strict=True)]
            dtype = declared.dtype(torch.float16)
            inputs.append(_channels_last(torch.empty(shape, dtype=dtype, device=META)))
        return inputs


def step_rows(model: TracedModel, gpu: Gpu, batch: int, branched: TracedModel | None = None) -> list[Row]:
    """Expected milliseconds of one step, in all and by kind of kernel: in float16 as torch.compile runs it, and of our session.

    Our session runs what is between its operators eagerly, in one CUDA graph, or compiled (`--rest inductor`); attention is torch's, or ours (`--attention int8`).
    With `branched`, from `with_branches`, also the step with branches, in the kernels and as products of torch.
    """
    inputs, rows = model.inputs(batch), list[Row]()
    formats = code_formats(model.family, model.config, four_bits=gpu.has_int4)
    ours, attending = model.graph(formats), model.graph(formats, int8_attention=True)
    variants: tuple[tuple[str, fx.GraphModule, bool], ...] = (
        ("float16, compiled", model.graph({}), True),
        ("ours", ours, False),
        ("ours, rest compiled", ours, True),
        ("ours, attention in INT8", attending, False),
        ("ours, rest compiled, attention in INT8", attending, True),
    )
    if branched is not None:
        rank = max(branched.structure.branches.values(), default=0)
        own = code_formats(model.family, model.config, four_bits=gpu.has_int4, structure=branched.structure)
        variants += (
            (f"ours, branches of rank {rank} in the kernels", branched.graph(own), False),
            (f"ours, branches of rank {rank} by torch", branched.graph(own, branches=False), False),
        )
    for name, graph, compiled in variants:
        found = step_time(graph, inputs, gpu, compiled=compiled)
        first = rows[0]["step ms"] if rows else 1e3 * found.seconds
        rows.append(
            {
                "graph": name,
                "step ms": round(1e3 * found.seconds, 2),
                "over float16": round(first / (1e3 * found.seconds), 2),
                "kernels": found.launches,
                **{f"{kind} ms": round(1e3 * seconds, 2) for kind, seconds in found.by_kind().items()},
            }
        )
    kinds = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, 0.0) for column in kinds} for row in rows]


def show_steps(name: str, gpu: Gpu, tables: Mapping[int, list[Row]], *, as_json: bool) -> None:
    """Print the rows of `step_rows` of a model, by batch size."""
    if as_json:
        console.print_json({"expected": True, "model": name, "GPU": gpu.name, "note": STEP_NOTE, "steps": tables})
        return
    console.print_facts({"model": name, "GPU": f"{gpu.title} ({gpu.sm})", "note": STEP_NOTE})
    for batch, rows in tables.items():
        console.print_table(f"Expected step on {gpu.title}, batch {batch}", rows)


def code_formats(family: Family, config: Config, *, four_bits: bool = True, structure: NetworkRewrite = PUBLISHED) -> dict[str, CodeFormat]:
    """Code formats of a W4A4 model: `s4` where the family quantizes, `s8` where it keeps 8 bits; all `s8` without `four_bits`. Branches have none."""
    kinds: dict[str, CodeFormat] = {}
    for name in family.sites(meta_model(family, config, structure)):
        placement = family.placement(layer_of(name))
        if placement != "float" and not in_branch(name):
            kinds[name] = "s4" if placement == "quantize" and four_bits else "s8"
    return kinds


def _stand_in(layer: Any, kind: CodeFormat) -> PackedLayer:
    outputs, channels, *window = layer.weight.shape
    shape = (outputs, math.prod(window), code_bytes(channels, bits_of(kind)))
    return PackedLayer(
        kind=kind,
        weight=torch.empty(shape, dtype=torch.uint8, device=META),
        weight_scale=torch.empty(outputs, device=META),
        weight_sum=torch.empty(outputs, dtype=torch.int32, device=META),
        bias=None if layer.bias is None else torch.empty(outputs, device=META),
        act_scale=torch.ones(1),  # tables are compared, so they need values until the graph is made
        inv_scale=torch.ones(1),
        qmin=torch.full((1,), -8, dtype=torch.int32),
        qmax=torch.full((1,), 7, dtype=torch.int32),
        zero=torch.zeros(1, 16, dtype=torch.uint8),
    )


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 and value.is_floating_point() else value

"""The graph of `--int4 plugin`: each site whose codes fit 4 bits becomes two nodes of the TensorRT plugins; all other sites are Q/DQ.

    Conv     x [N, C, H, W] -> EdmQuantize -> codes [N, H, W, Cb] -> EdmConv -> [N, P, Q, K] -> Transpose
    MatMul   x [B, L, C] -> Unsqueeze -> EdmQuantize (channels last) -> codes [B, L, 1, Cb] -> EdmConv, a 1x1 filter -> [B, L, 1, K] -> Squeeze

The nodes compute the same as the Q/DQ form; `plugin_schema.py` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.errors import UnsupportedError
from edm_deploy.export.plugin_schema import CONV, NAMESPACE, QUANTIZE, VERSION, Plugin
from edm_deploy.export.qdq import GraphWriter
from edm_deploy.export.trace import SiteNodes
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.kernel_layout import CodeFormat, code_bytes, pack_weight, weight_sum, zero_codes
from edm_deploy.runtime.capabilities import CAPABILITIES, code_format, unsupported_reason

BITS = 4
FILTERS = CAPABILITIES["cuda"].filters or ()  # filter sizes that have kernels
UNSQUEEZED: Mapping[int, list[int]] = {2: [1, 2], 3: [2], 4: []}  # axes to insert into a linear's input, by its rank, to get [B, H, W, C]


def plugin_kinds(artifact: Artifact) -> dict[str, CodeFormat]:
    """The sites that plugin nodes compute, each with its code format: signed (`s4`) or unsigned (`u4`).

    Raises:
        UnsupportedError: There are none.
    """
    layers = artifact.family_object.sites(artifact.skeleton())
    kinds = {name: code_format(site) for name, site in artifact.sites.items() if site.activation is not None}
    supported: dict[str, CodeFormat] = {
        name: kind for name, kind in kinds.items() if kind != "s8" and unsupported_reason(layers[name], FILTERS) is None
    }
    if not supported:
        raise UnsupportedError(
            f"None of the {len(artifact.sites)} sites of this {artifact.scheme} artifact has codes that fit 4 bits, so that --int4 plugin "
            "applies to none. Leave it out, or quantize with --weight-bits 4 --act-bits 4."
        )
    return supported


def insert_plugins(model: ir.Model, artifact: Artifact, sites: Mapping[str, SiteNodes], kinds: Mapping[str, CodeFormat]) -> dict[str, str]:
    """Rewrite each site in place: those in `kinds` as plugin nodes, the others as Q/DQ with INT8 weights.

    Args:
        model: The float16 graph from `trace`, unoptimised.
        artifact: Codes, scales and tables.
        sites: The nodes of each site, from `find_sites`.
        kinds: Code formats, from `plugin_kinds`.

    Returns:
        For each site the name of its EdmConv, Conv or MatMul node.
    """
    writer = _PluginWriter(model.graph, artifact)
    assert writer.float_dtype == ir.DataType.FLOAT16, "the plugins compute in float16"
    model.graph.opset_imports[NAMESPACE] = int(VERSION)
    writer.write_row_lookup()
    layers = artifact.family_object.sites(artifact.skeleton())
    names = {}
    for name, nodes in sites.items():
        site = artifact.sites[name]
        names[name] = (
            writer.rewrite_as_plugin(name, site, nodes, kinds[name], layers[name])
            if name in kinds
            else writer.rewrite(name, site, nodes, "int8")
        )
    return names


class _PluginWriter(GraphWriter):
    """A graph writer for plugin nodes. Sites that read one tensor through equal tables share its packed codes."""

    def __init__(self, graph: ir.Graph, artifact: Artifact) -> None:
        super().__init__(graph, artifact)
        self.packed: dict[tuple[ir.Value, CodeFormat], list[tuple[ActivationTable, ir.Value]]] = {}

    def rewrite_as_plugin(self, name: str, site: QuantizedLayer, nodes: SiteNodes, kind: CodeFormat, layer: nn.Conv2d | nn.Linear) -> str:
        """Replace one site's float nodes by its two plugin nodes; returns the name of the second."""
        at, x, table = nodes.dead[-1], nodes.x, site.activation
        assert table is not None and x.shape is not None, f"the plugins do not support {name}"
        axes = None if isinstance(layer, nn.Conv2d) else self._axes(name, len(x.shape))
        codes = self._codes(name, table, x, kind, at, axes)
        unsigned = kind == "u4"
        bias = self.artifact.params.get(f"{name}.bias", torch.zeros(len(site.weight_scale)))
        weight = pack_weight(site.codes, BITS).view(torch.int8)
        assert self.row is not None
        inputs = {
            "codes": codes,
            "weight": self._column(name, "weight_packed", weight),
            "zero": self._column(name, "zero", zero_codes(table.qmin.int(), BITS, unsigned=unsigned).view(torch.int8)),
            "row": self.row,
            "act_scale": self._column(name, "act_scale", table.scale),
            "qmin": self._column(name, "qmin_i32", table.qmin.int()),
            "weight_scale": self._column(name, "weight_scale", site.weight_scale),
            "weight_sum": self._column(name, "weight_sum", weight_sum(site.codes)),
            "bias": self._column(name, "bias_f32", bias.float()),
        }
        kernel, padding, stride = _geometry(layer)
        y = self._plugin(at, CONV, inputs, f"{name}/conv", (BITS, int(unsigned), kernel, padding, stride), ir.DataType.FLOAT16)
        y_shape = list(nodes.y.shape or [])
        if axes is None:
            y.shape = ir.Shape([y_shape[0], *y_shape[2:], y_shape[1]])
            y = self.node(at, "Transpose", [y], f"{name}/y", like=nodes.y, perm=[0, 3, 1, 2])
        elif axes:
            y.shape = ir.Shape([*y_shape[: axes[0]], *[1] * len(axes), *y_shape[axes[0] :]])
            y = self.node(at, "Squeeze", [y, self._axes_value(axes)], f"{name}/y", like=nodes.y)
        y.type, y.shape = ir.TensorType(ir.DataType.FLOAT16), nodes.y.shape
        self.replace(nodes, y)
        return f"{name}/conv"

    def _axes(self, name: str, rank: int) -> list[int]:
        if rank not in UNSQUEEZED:
            raise UnsupportedError(
                f"Site {name!r}: a linear of an input with {rank} dimensions; plugins take 2 to 4. Export with --int4 qdq."
            )
        return UNSQUEEZED[rank]

    def _codes(self, name: str, table: ActivationTable, x: ir.Value, kind: CodeFormat, at: ir.Node, axes: list[int] | None) -> ir.Value:
        """The packed codes of `x`: a feature map [N, C, H, W] where `axes` is None, else [B, ..., C] unsqueezed at `axes`."""
        shared = self.packed.setdefault((x, kind), [])
        for other, value in shared:
            if other.equals(table):
                return value
        assert x.shape is not None and self.row is not None
        values = self.cast(at, x, ir.DataType.FLOAT16, f"{name}/x_f16")
        shape = list(x.shape) if axes is None else [*x.shape[:-1], *[1] * len(axes), x.shape[-1]]
        if axes:
            values = self.node(at, "Unsqueeze", [values, self._axes_value(axes)], f"{name}/pixels")
            values.type, values.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape(shape)
        inputs = {
            "x": values,
            "row": self.row,
            "inv_scale": self._column(name, "inv_scale_table", table.inv_scale),
            "qmin": self._column(name, "qmin_i32", table.qmin.int()),
            "qmax": self._column(name, "qmax_i32", table.qmax.int()),
        }
        attributes = (BITS, int(kind == "u4"), int(axes is not None))
        codes = self._plugin(at, QUANTIZE, inputs, f"{name}/codes", attributes, ir.DataType.INT8)
        n, h, w, c = shape if axes is not None else [shape[0], shape[2], shape[3], shape[1]]
        assert isinstance(c, int), "channels are fixed"
        codes.shape = ir.Shape([n, h, w, code_bytes(c, BITS)])
        shared.append((table, codes))
        return codes

    def _plugin(
        self, at: ir.Node, plugin: Plugin, inputs: Mapping[str, ir.Value], output: str, attributes: Sequence[int], dtype: ir.DataType
    ) -> ir.Value:
        """Insert a plugin node; returns its output. TensorRT's parser finds the plugin by the last three attributes."""
        assert tuple(inputs) == plugin.inputs
        parser: dict[str, str | int] = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1}
        fields = dict(zip(plugin.attributes, attributes, strict=True))
        node = ir.node(plugin.name, list(inputs.values()), attributes={**fields, **parser}, domain=NAMESPACE, name=output)
        (value,) = node.outputs
        value.name, value.type = output, ir.TensorType(dtype)
        self.graph.insert_before(at, node)
        return value

    def _column(self, name: str, what: str, tensor: Tensor) -> ir.Value:
        return self.constant(f"{name}.{what}", tensor.contiguous().numpy())

    def _axes_value(self, axes: list[int]) -> ir.Value:
        return self.constant(f"axes.{'_'.join(map(str, axes))}", np.array(axes, dtype=np.int64))


def _geometry(layer: nn.Conv2d | nn.Linear) -> tuple[int, int, int]:
    """Filter size, padding and stride; those of a Linear are of a 1x1 convolution."""
    if isinstance(layer, nn.Linear):
        return 1, 0, 1
    padding = layer.padding[0]
    assert isinstance(padding, int), "`unsupported_reason` refuses named padding"
    return layer.kernel_size[0], padding, layer.stride[0]

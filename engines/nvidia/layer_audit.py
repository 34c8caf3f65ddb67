"""Read the layer table of an NVIDIA engine from the builder's verbose log or the engine inspector, and audit the quantized sites in it.

The table proves the data types passed to the kernel library, not the kernel, which TensorRT-RTX selects on the GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edm_deploy.runtime.manifest import GraphSite

MULTIPLIES = ("correlation", "convolution", "gemm", "matmul", "matrix_multiply")  # parts of layer types that sum products
_TENSOR = re.compile(r"Dimensions: \[(?P<dims>[^\]]*)\].*?Datatype: (?P<type>\w+)")
_SECTION = re.compile(r", (Inputs|Constants|Outputs|TacticName|StreamId|Metadata): ")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        name: As the builder names it.
        type: `correlation`, `gemm`, `kgen`, ...
        inputs: Data types of the input tensors.
        constants: Data types of weights and scales.
        outputs: Data types of the output tensors.
        nodes: Names of the ONNX nodes it computes.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product or a convolution."""
        return any(word in self.type.lower() for word in MULTIPLIES)

    @property
    def problem(self) -> str | None:
        """Why it is not an integer product, or None."""
        operands = self.inputs + self.constants
        if "Int8" not in self.inputs or operands.count("Int8") < 2:
            return f"{self.type} on {', '.join(operands) or 'nothing'}: floating-point arithmetic on dequantized values"
        if "Half" in self.outputs and "gemm" in self.type:
            return "the integer sum is written as Half before it is scaled; it overflows past 65504"
        return None


@dataclass(frozen=True)
class LayerAudit:
    """How one quantized site is executed.

    Attributes:
        layers: Names of the layers that compute its product.
        types: Their types and operand types, `correlation(Int8, Int8, Float, Float)`.
        problem: Why it is not computed in integers, or None.
    """

    layers: tuple[str, ...]
    types: tuple[str, ...]
    problem: str | None


def layers_from_log(messages: Iterable[str]) -> list[EngineLayer]:
    """Layers of every `Layers:` table in a verbose build log, which has one table per compute capability."""
    tables = (message.split("I/O Tensors:")[0] for message in messages if message.lstrip().startswith("Layers:"))
    return [_layer(line.strip()) for table in tables for line in table.splitlines() if line.strip().startswith("Name: ")]


def _layer(line: str) -> EngineLayer:
    head, *rest = _SECTION.split(line)
    sections: dict[str, str] = dict(zip(rest[0::2], rest[1::2], strict=True))
    name, _, kind = head.removeprefix("Name: ").partition(", LayerType: ")

    def types(section: str) -> tuple[str, ...]:
        return tuple(found["type"] for found in _TENSOR.finditer(sections.get(section, "")))

    return EngineLayer(
        name, kind, types("Inputs"), types("Constants"), types("Outputs"), tuple(_ONNX.findall(sections.get("Metadata", "")))
    )


def layers_from_inspector(text: str) -> list[EngineLayer]:
    """Layers of an engine inspector's json, as TensorRT 10 and 11 print it with detailed profiling. Not executed on a GPU yet."""

    def types(tensors: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
        described = (tensor.get("Format/Datatype") or tensor.get("Datatype", "") for tensor in tensors)
        return tuple(
            next((word for word in ("Int8", "Int4", "Half", "BFloat16", "Float") if word in description), description)
            for description in described
        )

    return [
        EngineLayer(
            name=entry["Name"],
            type=entry["LayerType"],
            inputs=types(entry.get("Inputs", ())),
            constants=types(entry.get("Constants", ())) + ((entry["Weights"]["Type"],) if "Weights" in entry else ()),
            outputs=types(entry.get("Outputs", ())),
            nodes=tuple(_ONNX.findall(entry.get("Metadata", ""))),
        )
        for entry in json.loads(text)["Layers"]
        if isinstance(entry, dict)
    ]


def audit(layers: Iterable[EngineLayer], sites: Mapping[str, GraphSite]) -> dict[str, LayerAudit]:
    """How each site with a quantized input is executed, by site name."""
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    return {name: _finding(by_node.get(site.node, [])) for name, site in sites.items() if site.quantized_input}


def _finding(layers: list[EngineLayer]) -> LayerAudit:
    products = [layer for layer in layers if layer.multiplies]
    if not products:
        return LayerAudit(
            (), (), f"no product layer bears its name, only {', '.join(sorted({layer.type for layer in layers})) or 'nothing'}"
        )
    problems = [layer.problem for layer in products if layer.problem]
    types = tuple(f"{layer.type}({', '.join(layer.inputs + layer.constants)})" for layer in products)
    return LayerAudit(tuple(layer.name for layer in products), types, problems[0] if problems else None)

"""What depends on the CPU that the tests run on."""

from __future__ import annotations

import functools


@functools.cache
def openvino_executes() -> str:
    """How OpenVINO executes a quantized site here: `int8`, or `float` on a CPU whose 8-bit products saturate."""
    import openvino

    from engines.openvino_graph.integer_products import exact_integer_products

    return "int8" if exact_integer_products(openvino) else "float"

"""Our kernels as TensorRT plugins, compiled ahead of time: TensorRT stores their code in the engine, which then needs neither Python nor this project.

TensorRT 10.9 introduced quick plugins (`tensorrt.plugin`). This file is tested against the Python part of NVIDIA's package; its C++ part, and with it the kernels
inside an engine, have not been executed yet.
Source: https://docs.nvidia.com/deeplearning/tensorrt, `tensorrt.plugin`; samples/python/quickly_deployable_plugins in github.com/NVIDIA/TensorRT.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from edm_deploy.errors import UnsupportedError
from edm_deploy.export.plugin_schema import CONV, NAMESPACE, QUANTIZE, Plugin
from edm_deploy.numerics.kernel_layout import CHUNK, code_bytes
from engines.kernels.build import source_files
from engines.kernels.compilers import compiled, nvrtc_compiler
from engines.kernels.launch import OCTET, THREADS, TURN
from engines.kernels.tiles import TILES, Tile

ARCH = "compute_80"  # of the PTX, which the driver compiles for the GPU that the engine runs on, with 4-bit tensor cores where it has them
MOST_BLOCKS = 65535  # along y and z of a grid; the kernels stride over what a smaller grid leaves
OLDEST = "10.9"


def register() -> None:
    """Register the plugins with TensorRT, before a graph that contains them is parsed. Further calls have no effect.

    Raises:
        UnsupportedError: TensorRT is missing, or older than 10.9.
    """
    try:
        trt, trtp = importlib.import_module("tensorrt"), importlib.import_module("tensorrt.plugin")
    except ImportError as err:
        raise UnsupportedError(f"INT4 plugin nodes need TensorRT {OLDEST} or newer, which cannot be imported here ({err}).") from err
    if not hasattr(trtp, "aot_impl"):
        raise UnsupportedError(
            f"INT4 plugin nodes need TensorRT {OLDEST} or newer; this one is {trt.__version__}. Install a newer one, or export with --int4 qdq."
        )
    for plugin, describe, implement in ((QUANTIZE, _quantized, _quantize), (CONV, _convolved, _convolve)):
        if hasattr(trtp.op, NAMESPACE) and hasattr(getattr(trtp.op, NAMESPACE), plugin.name):
            continue
        _decorate(trt, trtp, plugin, describe, implement)


def _decorate(trt: Any, trtp: Any, plugin: Plugin, describe: Callable[..., Any], implement: Callable[..., Any]) -> None:
    """Register one plugin's functions. TensorRT reads their signatures, which are generated from the plugin's inputs and attributes."""
    inputs = dict.fromkeys(plugin.inputs, trtp.TensorDesc)
    attributes = dict.fromkeys(plugin.attributes, int)

    def shape(*args: Any, **kwargs: Any) -> Any:
        return describe(trt, trtp, **shape_signature.bind(*args, **kwargs).arguments)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return implement(trtp, **kernel_signature.bind(*args, **kwargs).arguments)

    def formats(*args: Any, **kwargs: Any) -> Any:
        tactics = list(range(1, len(TILES) + 1)) if plugin is CONV else None
        return [trtp.AutoTuneCombination(", ".join(plugin.types), "LINEAR", tactics)]

    shape_signature = _signature(inputs | attributes, trtp.TensorDesc)
    launch = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]  # type: ignore[name-defined]  # classes of a module that is passed in
    kernel_signature = _signature(inputs | attributes | {"outputs": tuple[trtp.TensorDesc], "tactic": int}, launch)  # type: ignore[name-defined]
    shape.__signature__ = shape_signature  # type: ignore[attr-defined]  # what inspect.signature looks for
    kernel.__signature__ = kernel_signature  # type: ignore[attr-defined]
    formats.__signature__ = _signature(inputs | {"outputs": tuple[trtp.TensorDesc]}, list[trtp.AutoTuneCombination])  # type: ignore[attr-defined, name-defined]
    trtp.register(plugin.id)(shape)
    trtp.autotune(plugin.id)(formats)
    trtp.aot_impl(plugin.id)(kernel)


def _signature(parameters: Mapping[str, Any], returns: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, annotation=type_) for name, type_ in parameters.items()], return_annotation=returns
    )


def _quantized(trt: Any, trtp: Any, *, x: Any, bits: int, channels_last: int, **_: Any) -> Any:
    """int8 [N, H, W, Cb] for x [N, C, H, W], or [N, H, W, C]."""
    n, h, w, c = _pixels(x, channels_last)
    return trtp.from_shape_expr((n, h, w, trtp.cdiv(c, 8 * CHUNK // bits) * CHUNK), dtype=trt.int8)


def _quantize(trtp: Any, *, x: Any, bits: int, unsigned_codes: int, channels_last: int, outputs: Any, **_: Any) -> Any:
    """The kernel, its launch and its integers N, HW, C, Cb."""
    n, h, w, c = _pixels(x, channels_last)
    pixels, stored = h * w, outputs[0].shape_expr[3]
    params = trtp.KernelLaunchParams(block_x=THREADS)
    if channels_last:
        params.grid_x, params.grid_y = trtp.cdiv(pixels * (stored // bits), THREADS), trtp.min(n, MOST_BLOCKS)
    else:
        params.grid_x, params.grid_z = trtp.cdiv(pixels, TURN), trtp.min(n, MOST_BLOCKS)
        params.grid_y = trtp.min(trtp.cdiv(stored // bits * OCTET, TURN), MOST_BLOCKS)
    name, code = quantize_code(bits, unsigned=bool(unsigned_codes), channels_last=bool(channels_last))
    return name, code, params, _integers(trtp, n, pixels, c, stored)


def _convolved(trt: Any, trtp: Any, *, codes: Any, weight: Any, kernel: int, padding: int, stride: int, **_: Any) -> Any:
    """float16 [N, P, Q, K]."""
    n, h, w, _stored = codes.shape_expr
    p, q = ((size - (kernel - 2 * padding)) // stride + 1 for size in (h, w))
    return trtp.from_shape_expr((n, p, q, weight.shape_expr[0]), dtype=trt.float16)


def _convolve(trtp: Any, *, codes: Any, outputs: Any, tactic: int, **attributes: Any) -> Any:
    """The kernel of tile number `tactic`, its launch and its integers N, H, W, Cb, K, R, S, P, Q, padding, stride."""
    n, h, w, stored = codes.shape_expr
    _n, p, q, k = outputs[0].shape_expr
    tile = TILES[tactic - 1]
    params = trtp.KernelLaunchParams(block_x=tile.threads, shared_mem=tile.shared_bytes)
    params.grid_x, params.grid_y = trtp.cdiv(n * p * q, tile.BM), trtp.cdiv(k, tile.BN)
    kind = "s8" if attributes["bits"] == 8 else "u4" if attributes["unsigned_codes"] else "s4"
    name, code = conv_code(kind, tile)
    kernel, padding, stride = (attributes[name] for name in ("kernel", "padding", "stride"))
    return name, code, params, _integers(trtp, n, h, w, stored, k, kernel, kernel, p, q, padding, stride)


def _pixels(x: Any, channels_last: int) -> tuple[Any, Any, Any, Any]:
    """Symbolic N, H, W, C of an activation."""
    a, b, c, d = x.shape_expr
    return (a, b, c, d) if channels_last else (a, c, d, b)


def _integers(trtp: Any, *values: Any) -> Any:
    """The kernel's integer arguments, each of 32 bits; `from_tuple` alone would not fix the width of a constant, which TensorRT refuses."""
    return trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(value) for value in values))


def quantize_code(bits: int, *, unsigned: bool, channels_last: bool) -> tuple[str, bytes]:
    """Name and PTX of EdmQuantize's kernel."""
    code_bytes(1, bits)  # refuses other widths
    order = "last" if channels_last else "first"
    name = f"plugin_quantize_{order}_{'u' if unsigned else 's'}{bits}"
    kernel = f"quantize_last<f16, {bits}, PLAIN>" if channels_last else f"quantize_first<f16, {bits}, false>"
    return name, _ptx(name, PLUGIN_KERNEL=kernel, PLUGIN_BOUNDS=str(THREADS), PLUGIN_UNSIGNED=str(int(unsigned)))


def conv_code(kind: str, tile: Tile) -> tuple[str, bytes]:
    """Name and PTX of EdmConv's kernel for codes of `kind` (`s4`, `u4`, `s8`) and one tile."""
    name = f"plugin_conv_{kind}_{tile.name}"
    kernel = f"convolve<{kind.upper()}, Tile<{tile.BM}, {tile.BN}, {tile.warp_m}, {tile.stages}>, f16>"
    return name, _ptx(name, PLUGIN_KERNEL=kernel, PLUGIN_BOUNDS=f"{tile.threads}, {tile.blocks}")


def entry_source(name: str, macros: Mapping[str, str]) -> bytes:
    """Source of one entry point, which includes `cuda/plugin.cu`."""
    defines = [f"#define {macro} {value}\n" for macro, value in {"PLUGIN_ENTRY": name, **macros}.items()]
    return "".join([*defines, '#include "plugin.cu"\n']).encode()


def _ptx(name: str, **macros: str) -> bytes:
    return _compiled_once(name, tuple(macros.items()))


@functools.cache
def _compiled_once(name: str, macros: tuple[tuple[str, str], ...]) -> bytes:
    """The PTX, compiled once per kernel: a model has hundreds of nodes and a dozen kernels."""
    main = "plugin_entry.cu"
    return compiled(source_files() | {main: entry_source(name, dict(macros))}, main, ARCH, nvrtc_compiler())

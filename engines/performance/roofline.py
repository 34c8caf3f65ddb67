"""Expected times of a layer on a GPU, in float16, INT8 and INT4, and what bounds them. Computed from GPU figures and shapes, not measured.

A layer is the matmul [rows, channels * taps] x [channels * taps, outputs], cut into tiles (an implicit GEMM). A tile occupies the tensor
cores of one multiprocessor, so whole waves of tiles count; its operands are read through L2; weights, and activations that exceed L2, are read from DRAM.
The three overlap: the longest counts. Each kernel adds its launch overhead. Where there are too few tiles, several blocks share the sum of a tile (split-K)
and a second kernel adds their parts. profiles/measured.toml has published measurements of such kernels, and the deviation of this model from them.
Source: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edm_deploy.network.layer_costs import SiteWork
from edm_deploy.numerics.kernel_layout import CHUNK
from engines.kernels.tiles import STAGE_BYTES, choose_tile
from engines.performance.gpus import Gpu, launch_seconds

Precision = Literal["float16", "int8", "int4"]
Bound = Literal["tensor cores", "L2", "DRAM", "launch"]

MAIN_LOOP = 0.80  # share of the tensor cores' peak that a good main loop reaches; fitted to profiles/measured.toml
L2_PORT = 64  # bytes a clock that one multiprocessor reads from L2. Source: Jia et al., arXiv 1804.06826, section 3.5
OTHERS_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64), (32, 64))  # of cuDNN, cuBLAS and CUTLASS; the fastest counts
OTHERS_SPLITS = (1, 2, 4, 8, 16)
BITS: Mapping[Precision, int] = {"float16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """The matmul equivalent to a layer, for a whole batch.

    Attributes:
        rows: Output positions of all samples.
        channels, taps, outputs: Sizes of the filter; taps is 1 for a Linear.
        inputs: Input positions of all samples; None where they equal `rows`.
    """

    rows: int
    channels: int
    taps: int
    outputs: int
    inputs: int | None = None

    @classmethod
    def of(cls, site: SiteWork, batch: int) -> Matmul:
        """The matmul of `site` for `batch` samples."""
        return cls(
            rows=batch * site.outputs_at, channels=site.channels, taps=site.taps, outputs=site.outputs, inputs=batch * site.inputs_at
        )

    @property
    def operations(self) -> int:
        """Operations, two per multiply-accumulate."""
        return 2 * self.rows * self.channels * self.taps * self.outputs

    @property
    def input_positions(self) -> int:
        """Input positions of all samples."""
        return self.rows if self.inputs is None else self.inputs


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Expected time of a layer; not a measurement.

    Attributes:
        parts: Seconds by bound: launches, and for each kernel the longest of its three roofs.
        precision: Precision of the tensor-core operations: int8 where int4 was requested on a GPU without INT4.
        tile: Rows and output channels of a tile.
        splits: Blocks that share a tile's sum.
        quantize_seconds: Part of the time that the separate kernel for quantizing and packing the input takes.
    """

    parts: Mapping[Bound, float]
    precision: Precision
    tile: tuple[int, int]
    splits: int
    quantize_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all kernels of the layer, launches included."""
        return sum(self.parts.values())

    @property
    def bound(self) -> Bound:
        """The bound with the largest share of the time."""
        return max(self.parts, key=lambda name: self.parts[name])


def expected(
    matmul: Matmul,
    precision: Precision,
    gpu: Gpu,
    *,
    fused_quantize: bool = False,
    graph: bool = True,
    resident: bool = True,
    quantize: bool = True,
) -> Expected:
    """Expected time of one layer: of our kernel with the tile and split of `tiles.choose_tile`, or of the vendor's in float16.

    Args:
        matmul: Shape of the layer.
        precision: Precision of the operands; the output is float16.
        gpu: The GPU.
        fused_quantize: Whether the preceding kernel writes codes, at no cost; otherwise a separate kernel reads float16 and writes them.
        graph: Whether kernels are launched by a CUDA graph.
        resident: Whether activations that fit stay in L2 between kernels; False for a benchmark that flushes L2.
        quantize: False where the input's codes were computed for another site.
    """
    precision = "int8" if precision == "int4" and not gpu.has_int4 else precision
    launch = launch_seconds(graph=graph)
    if precision == "float16":
        return others(matmul, precision, gpu, graph=graph, resident=resident)
    depth = matmul.taps * _pixel_bytes(matmul.channels, precision)
    tile, splits = choose_tile(matmul.rows, matmul.outputs, depth, gpu.sms)
    found = _kernel(matmul, precision, gpu, (tile.BM, tile.BN), splits, launch, resident, 2)
    if fused_quantize or not quantize:
        return found
    moved = matmul.input_positions * (2 * matmul.channels + _pixel_bytes(matmul.channels, precision))
    copy = _moved(moved, gpu, stays=resident and moved <= gpu.l2_size / 2)
    return replace(found, parts=_sum(found.parts, {"launch": launch}, copy), quantize_seconds=launch + sum(copy.values()))


def others(
    matmul: Matmul,
    precision: Precision,
    gpu: Gpu,
    *,
    graph: bool = True,
    resident: bool = True,
    tile: tuple[int, int] | None = None,
    out_bytes: float = 2,
) -> Expected:
    """Expected time of a third-party kernel, with the fastest tile and split.

    `tile` names the only one to consider, `out_bytes` the size of an output element; the rest is as in `expected`.
    """
    launch = launch_seconds(graph=graph)
    depth = matmul.taps * _pixel_bytes(matmul.channels, precision)
    choices = [(each, splits) for each in ((tile,) if tile else OTHERS_TILES) for splits in OTHERS_SPLITS if splits * STAGE_BYTES <= depth]
    found = (_kernel(matmul, precision, gpu, *choice, launch, resident, out_bytes) for choice in choices or [((32, 64), 1)])
    return min(found, key=lambda candidate: candidate.seconds)


def faster_as_int8(sites: Mapping[str, SiteWork], gpu: Gpu, batch: int, *, fused_quantize: bool = False) -> frozenset[str]:
    """The sites that are expected to be no slower in INT8 than in INT4, so that 4 bits only save memory there.

    Args:
        sites: Sites that INT4 kernels could compute, by name.
        gpu: The GPU; for one without INT4 tensor cores all sites are returned.
        batch: Samples per call.
        fused_quantize: As in `expected`.
    """

    def seconds(site: SiteWork, precision: Precision) -> float:
        return expected(Matmul.of(site, batch), precision, gpu, fused_quantize=fused_quantize).seconds

    # Differences below 1 % are within the accuracy of the figures; among equals INT8 is the safer choice.
    return frozenset(name for name, site in sites.items() if seconds(site, "int8") <= 1.01 * seconds(site, "int4"))


def _kernel(
    matmul: Matmul, precision: Precision, gpu: Gpu, tile: tuple[int, int], splits: int, launch: float, resident: bool, out_bytes: float
) -> Expected:
    pixel = _pixel_bytes(matmul.channels, precision)
    in_bytes, weight_bytes = matmul.input_positions * pixel, matmul.outputs * matmul.taps * pixel
    written = matmul.rows * matmul.outputs * out_bytes
    stays = resident and in_bytes + written <= gpu.l2_size / 2
    partial = splits * matmul.rows * matmul.outputs * 4 if splits > 1 else 0  # int32 sums, or float32
    partial_stays = partial <= gpu.l2_size / 2
    rows, outputs = tile
    blocks = math.ceil(matmul.rows / rows) * math.ceil(matmul.outputs / outputs) * splits
    waves = math.ceil(blocks / gpu.sms)
    depth = math.ceil(math.ceil(matmul.taps * pixel / STAGE_BYTES) / splits) * STAGE_BYTES
    loaded = (rows + outputs) * depth
    roofs: dict[Bound, float] = {
        "tensor cores": waves * 2 * rows * outputs * depth * 8 / BITS[precision] / (gpu.ops[precision] * gpu.clock * MAIN_LOOP),
        "L2": max((blocks * loaded + written + partial) / gpu.l2, waves * loaded / (L2_PORT * gpu.clock)),
        "DRAM": (weight_bytes + (0 if stays else in_bytes + written) + (0 if partial_stays else partial)) / gpu.dram,
    }
    highest = max(roofs, key=lambda name: roofs[name])
    reduce = _moved(partial + written, gpu, stays=partial_stays) if partial else {}
    parts = _sum({highest: roofs[highest]}, {"launch": launch * (2 if partial else 1)}, reduce)
    return Expected(parts=parts, precision=precision, tile=tile, splits=splits)


def _moved(size: float, gpu: Gpu, *, stays: bool) -> dict[Bound, float]:
    return {"L2": size / gpu.l2} if stays else {"DRAM": size / gpu.dram}


def _sum(*parts: Mapping[Bound, float]) -> dict[Bound, float]:
    total: dict[Bound, float] = {}
    for part in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def _pixel_bytes(channels: int, precision: Precision) -> int:
    return math.ceil(channels * BITS[precision] / 8 / CHUNK) * CHUNK

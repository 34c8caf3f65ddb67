"""TensorRT-RTX: engines for named GPUs, built ahead of time on a machine without a GPU. The build verifies that each quantized site became an integer layer."""

from __future__ import annotations

from typing import ClassVar

from engines.nvidia.build_process import main
from engines.nvidia.tensorrt_backend import Nvinfer

PACKAGE = "tensorrt_rtx"


class TrtRtxBackend(Nvinfer):
    """TensorRT-RTX. Its builder does not time kernels, so there is no timing cache."""

    name: ClassVar[str] = "trt-rtx"
    options: ClassVar[frozenset[str]] = frozenset({"gpu", "optimization_level", "workspace_mib"})
    package: ClassVar[str] = PACKAGE
    module: ClassVar[str] = "engines.trt_rtx"
    install: ClassVar[str] = 'Install it with pip install "edm-deploy[trt-rtx]" (no GPU needed to build), or build for ort or openvino.'
    default_gpus: ClassVar[tuple[str, ...]] = (
        "sm_86",
        "sm_89",
        "sm_120",
    )  # GeForce RTX 30, 40 and 50; a further target adds little


BACKEND = TrtRtxBackend()

if __name__ == "__main__":
    main(BACKEND.package, BACKEND.install)

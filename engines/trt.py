"""TensorRT 10.9 and later, including 11, with strongly typed networks: engines for the GPU of the machine that builds them. Not executed on a GPU yet.

Plugins are registered before a graph with INT4 plugin nodes is parsed. The engine contains their code and opens without them.
"""

from __future__ import annotations

from typing import ClassVar

from engines.nvidia.build_process import main
from engines.nvidia.tensorrt_backend import Nvinfer

PACKAGE = "tensorrt"


class TrtBackend(Nvinfer):
    """TensorRT. Its builder times kernels on the GPU; quantized sites are audited by the engine inspector."""

    name: ClassVar[str] = "trt"
    options: ClassVar[frozenset[str]] = frozenset({"optimization_level", "timing_cache", "workspace_mib"})
    package: ClassVar[str] = PACKAGE
    module: ClassVar[str] = "engines.trt"
    install: ClassVar[str] = (
        'Run pip install "edm-deploy[trt]" on a machine with an NVIDIA GPU. What can be built without one: '
        "trt-rtx (ahead of time, for a GPU that you name), ort, openvino."
    )


BACKEND = TrtBackend()

if __name__ == "__main__":
    from engines.kernels.tensorrt_plugin import register

    main(BACKEND.package, BACKEND.install, register)

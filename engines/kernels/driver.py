"""Load the kernels onto a GPU and launch them: CUDA's driver API in torch's context and on its current stream, through `cuda.bindings`.

No CUDA package is imported before the first call. `available` reports whether kernels could run on this machine; `prepare` builds and loads them, which takes
seconds the first time and must not happen during the capture of a CUDA graph; `launch` launches them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from edm_deploy.errors import UnsupportedError
from engines.kernels import build
from engines.kernels.compilers import INSTALL, Compiler
from engines.kernels.launch import Launch

log = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)  # cp.async and mma of 4-bit integers
OLDEST_DRIVER = (12, 0)  # CUDA release of compilers.PTX_VERSION
PTX_ARCH = "compute_{}{}".format(*LEAST_CAPABILITY)
# Errors after which CUDA computes nothing more in this process. Source: CUDA Driver API, CUresult, "the process must be terminated and relaunched".
STICKY = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721})
ELSEWHERE = "Use --backend ort, openvino or trt."


def available() -> str | None:
    """The reason why kernels cannot run on this machine, or None where they can."""
    try:
        _driver()
    except UnsupportedError as err:
        return str(err)
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device. Install a torch that is built for CUDA. {ELSEWHERE}"
    return None


def prepare(device: torch.device, source: str = build.MAIN) -> None:
    """Build the kernels of one file in `cuda/` for a GPU, where they are not cached, and load them.

    Raises:
        UnsupportedError: No driver, one that is too old, a GPU that is too old, or no compiler.
    """
    _driver().module(_index(device), source)


def launch(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch kernels in order on the device's current stream. Does not wait for them.

    Raises:
        UnsupportedError: As `prepare`, or the driver refuses a kernel.
        RuntimeError: An earlier kernel, ours or another's, has failed while it ran; the process can no longer use CUDA. torch raises the same.
    """
    index = _index(device)
    with torch.cuda.device(index):
        _driver().launch(launches, index, torch.cuda.current_stream(index).cuda_stream)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def arch_of(capability: tuple[int, int]) -> str:
    """Architecture, `sm_86`, that kernels are compiled for on a GPU of this compute capability.

    Raises:
        UnsupportedError: It is below 8.0.
    """
    if capability < LEAST_CAPABILITY:
        raise UnsupportedError(
            f"This GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 (A100, RTX 30 series) or later. {ELSEWHERE}"
        )
    return "sm_{}{}".format(*capability)


class Driver:
    """The driver, with our kernels loaded on each GPU in use.

    Args:
        api: `cuda.bindings.driver`, or an object with its functions.

    Raises:
        UnsupportedError: There is no driver, or it finds no GPU.
    """

    def __init__(self, api: Any) -> None:
        self._api = api
        self._modules: dict[tuple[int, str], _Module] = {}
        self._loading = threading.Lock()
        try:
            self._call("cuInit", 0, doing="The NVIDIA driver cannot start", remedy=ELSEWHERE)
        except RuntimeError as err:  # the library itself is missing
            raise UnsupportedError(f"No NVIDIA driver is installed (libcuda cannot be loaded). Install one. {ELSEWHERE}") from err

    def module(self, index: int, source: str = build.MAIN) -> _Module:
        """The kernels of one file in `cuda/` on GPU number `index`, loaded at the first call."""
        with self._loading:
            if (index, source) not in self._modules:
                self._modules[index, source] = self._load(index, source)
            return self._modules[index, source]

    def launch(self, launches: Sequence[Launch], index: int, stream: int) -> None:
        """Launch kernels on a stream of GPU number `index`."""
        modules = {source: self.module(index, source) for source in {one.source: None for one in launches}}
        with self._current(next(iter(modules.values())).context):
            for one in launches:
                function = modules[one.source].function(one.entry, one.shared_bytes)
                # The driver takes an array of addresses, one per argument, and copies the arguments before it returns.
                arguments = (ctypes.c_void_p * 1)(ctypes.addressof(one.params))
                self._call(
                    "cuLaunchKernel",
                    function,
                    *one.grid,
                    one.threads,
                    1,
                    1,
                    one.shared_bytes,
                    stream,
                    ctypes.addressof(arguments),
                    0,
                    doing=f"Kernel {one.entry} with grid {list(one.grid)} cannot be started",
                )

    def _load(self, index: int, source: str) -> _Module:
        arch = self._arch_for(arch_of(torch.cuda.get_device_capability(index)), build.compiler_in_use())
        device = self._call("cuDeviceGet", index, doing=f"GPU {index} cannot be opened")
        context = self._call("cuDevicePrimaryCtxRetain", device, doing=f"GPU {index} cannot be opened")
        start = time.perf_counter()
        built = build.cubin(arch, main=source)
        with self._current(context):
            handle = self._call("cuModuleLoadData", built.code, doing=f"The kernels for {built.arch}, {built.path}, cannot be loaded")
        log.info("Kernels for %s by %s loaded in %.1f s from %s.", built.arch, built.compiler, time.perf_counter() - start, built.path)
        return _Module(self, handle, context)

    def _arch_for(self, arch: str, compiler: Compiler) -> str:
        """What to compile for: the GPU itself, or PTX where the driver is older than the compiler. Called before anything is compiled.

        A driver runs a cubin of any compiler of its major version or an older one (CUDA's minor version compatibility).
        """
        number = self._call("cuDriverGetVersion", doing="The NVIDIA driver does not say its version")
        version = number // 1000, number % 1000 // 10
        words = "The NVIDIA driver supports CUDA {}.{}".format(*version)
        if version < OLDEST_DRIVER:
            raise UnsupportedError(
                f"{words}; the kernels need a driver for CUDA {OLDEST_DRIVER[0]}.{OLDEST_DRIVER[1]} or later. Update the driver."
            )
        if version[0] >= compiler.version[0]:
            return arch
        log.warning(
            "%s, and the kernels are compiled by %s: the driver translates them for %s from PTX, which takes a minute the first time. "
            "pip install 'edm-deploy[cuda12]' in place of 'edm-deploy[cuda]' compiles them for it.",
            words,
            compiler,
            arch,
        )
        return PTX_ARCH

    @contextlib.contextmanager
    def _current(self, context: Any) -> Iterator[None]:
        """Make a context the thread's current one, and leave the one that was found."""
        if int(self._call("cuCtxGetCurrent", doing="The current CUDA context is unknown")) == int(context):
            yield
            return
        self._call("cuCtxPushCurrent", context, doing="The GPU's context cannot be made the current one")
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent", doing="The CUDA context that was current cannot be restored")

    def _call(self, name: str, *arguments: Any, doing: str, remedy: str = "") -> Any:
        status, *values = getattr(self._api, name)(*arguments)
        if int(status):
            words = self._api.cuGetErrorName(status)[1], self._api.cuGetErrorString(status)[1]
            reason = ": ".join(word.decode() if isinstance(word, bytes) else str(word) for word in words)
            if int(status) in STICKY:
                raise RuntimeError(
                    f"CUDA has failed in this process ({reason}), in a kernel that was started earlier, of this or another library. "
                    "Start the process again; with CUDA_LAUNCH_BLOCKING=1 the call that fails is the one that raises."
                )
            raise UnsupportedError(f"{doing} ({reason}). {remedy}".rstrip())
        return values[0] if values else None


class _Module:
    """Our kernels in one GPU's context."""

    def __init__(self, driver: Driver, handle: Any, context: Any) -> None:
        self._driver = driver
        self._handle = handle
        self._functions: dict[str, Any] = {}
        self.context = context

    def function(self, entry: str, shared_bytes: int) -> Any:
        """A kernel by name, with `shared_bytes` of dynamic shared memory, a constant of each kernel."""
        if entry not in self._functions:
            call, api = self._driver._call, self._driver._api
            function = call("cuModuleGetFunction", self._handle, entry.encode(), doing=f"The kernels have no {entry}")
            attributes = api.CUfunction_attribute
            wanted = {}
            if shared_bytes:
                # Needed above 48 KB, of which a GPU may count its own reserve as well (1 KB on sm_90): always set.
                wanted[attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = shared_bytes
                # Percent of the L1 cache that becomes shared memory: two blocks of the largest tile need 98 of an RTX 3090's 100 KB.
                wanted[attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT] = 100
            for attribute, value in wanted.items():
                call("cuFuncSetAttribute", function, attribute, value, doing=f"{entry} cannot have {shared_bytes} bytes of shared memory")
            self._functions[entry] = function
        return self._functions[entry]


@functools.cache
def _driver() -> Driver:
    try:
        api = importlib.import_module("cuda.bindings.driver")
    except (ImportError, OSError) as err:
        raise UnsupportedError(f"cuda-bindings, which starts the kernels, cannot be imported here ({err}). Run {INSTALL}.") from err
    return Driver(api)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

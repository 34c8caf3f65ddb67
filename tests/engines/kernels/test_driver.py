"""The driver's calls, at two seams: a stand-in for `cuda.bindings.driver` that records, and can fail; and the real binding on a stand-in for libcuda.

What only a GPU can show is in test_dispatch.py, marked `gpu`.
"""

import ctypes
import enum
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from engines.kernels import build, driver
from engines.kernels.build import Compiler, Cubin
from engines.kernels.driver import Driver, arch_of
from engines.kernels.launch import Launch, StatsParams

CONTEXT, HANDLE, STREAM = 11, 22, 33


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701


class Api:
    """Answers as the binding does, (status, value): each call is kept, and those named in `failing` fail."""

    class CUfunction_attribute(enum.Enum):  # noqa: N801  # the binding's name
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9

    def __init__(self, version: int = 13000, **failing: Result) -> None:
        self.version, self.failing = version, failing
        self.calls: list[tuple] = []
        self.stack = [7]  # the context of another device is the current one

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.failing:
                return (self.failing[name],)
            return self.answer(name, arguments)

        return call

    def answer(self, name: str, arguments: tuple) -> tuple:
        if name == "cuGetErrorName":
            return Result.CUDA_SUCCESS, arguments[0].name.encode()
        if name == "cuGetErrorString":
            return Result.CUDA_SUCCESS, b"as CUDA explains it"
        if name == "cuCtxPushCurrent":
            self.stack.append(arguments[0])
        if name == "cuCtxPopCurrent":
            return Result.CUDA_SUCCESS, self.stack.pop()
        if name == "cuLaunchKernel":  # what the kernel would see: the struct behind the first address
            address = ctypes.cast(arguments[9], ctypes.POINTER(ctypes.c_void_p))[0]
            self.seen = StatsParams.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(StatsParams)))
        values = {
            "cuDeviceGet": 0,
            "cuDevicePrimaryCtxRetain": CONTEXT,
            "cuCtxGetCurrent": self.stack[-1],
            "cuDriverGetVersion": self.version,
            "cuModuleLoadData": HANDLE,
            "cuModuleGetFunction": "function",
        }
        return (Result.CUDA_SUCCESS, values[name]) if name in values else (Result.CUDA_SUCCESS,)

    def called(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """torch reports sm_86, and nothing is compiled; yields the requested architectures."""
    requested: list[str] = []

    def cubin(arch: str, *, main: str) -> Cubin:
        requested.append(arch)
        return Cubin(Path("/cache/kernels.cubin"), b"code", arch, Compiler("nvrtc", (13, 5)))

    monkeypatch.setattr(build, "cubin", cubin)
    monkeypatch.setattr(build, "compiler_in_use", lambda: Compiler("nvrtc", (13, 5)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    driver._driver.cache_clear()
    yield requested
    driver._driver.cache_clear()


def a_launch(shared_bytes: int = 0) -> Launch:
    return Launch("group_stats_f16", (4, 2, 1), 256, shared_bytes, StatsParams(N=2, groups=4, eps=0.5))


def test_a_launch_hands_over_name_grid_stream_and_struct(a_gpu):
    api = Api()
    Driver(api).launch([a_launch()], 0, STREAM)
    (arguments,) = api.called("cuLaunchKernel")
    assert arguments[:9] == ("function", 4, 2, 1, 256, 1, 1, 0, STREAM)
    assert arguments[10] == 0
    assert (api.seen.N, api.seen.groups, api.seen.eps) == (2, 4, 0.5)
    assert api.called("cuModuleGetFunction") == [(HANDLE, b"group_stats_f16")]
    assert a_gpu == ["sm_86"]


def test_kernels_are_loaded_once_and_into_torch_s_context():
    api = Api()
    one = Driver(api)
    one.launch([a_launch(), a_launch()], 0, STREAM)
    one.launch([a_launch()], 0, STREAM)
    assert len(api.called("cuLaunchKernel")) == 3
    assert len(api.called("cuModuleLoadData")) == len(api.called("cuModuleGetFunction")) == 1
    names = [call[0] for call in api.calls]
    assert names.index("cuCtxPushCurrent") < names.index("cuModuleLoadData") < names.index("cuCtxPopCurrent")


def test_the_context_that_was_current_stays_so_even_where_a_launch_fails():
    api = Api()
    Driver(api).launch([a_launch()], 0, STREAM)
    assert api.called("cuCtxPushCurrent") == [(CONTEXT,)] * 2  # to load, and to launch
    assert api.stack == [7]
    api = Api(cuLaunchKernel=Result.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)
    with pytest.raises(UnsupportedError):
        Driver(api).launch([a_launch()], 0, STREAM)
    assert api.stack == [7]
    api = Api()
    api.stack = [CONTEXT]
    Driver(api).launch([a_launch()], 0, STREAM)
    assert api.called("cuCtxPushCurrent") == []


@pytest.mark.parametrize("shared_bytes", [24576, 49152, 65536])
def test_dynamic_shared_memory_is_requested_below_48_kb_too(shared_bytes):
    api = Api()
    Driver(api).launch([a_launch(shared_bytes=shared_bytes)], 0, STREAM)
    (function, attribute, size), (_, carveout, percent) = api.called("cuFuncSetAttribute")
    assert (function, attribute.name, size) == ("function", "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", shared_bytes)
    assert (carveout.name, percent) == ("CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT", 100)


def test_a_kernel_without_dynamic_shared_memory_leaves_the_cache_alone():
    api = Api()
    Driver(api).launch([a_launch(shared_bytes=0)], 0, STREAM)
    assert api.called("cuFuncSetAttribute") == []


def test_a_gpu_s_own_capability_is_compiled_for():
    assert [arch_of(capability) for capability in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["sm_80", "sm_89", "sm_90", "sm_120"]


# ---- what goes wrong


def test_a_gpu_below_8_0_is_refused_with_other_backends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    message = r"compute capability 7.5; the kernels need 8.0 \(A100, RTX 30 series\) or later. Use --backend ort, openvino or trt."
    with pytest.raises(UnsupportedError, match=message):
        Driver(Api()).module(0)


def test_a_missing_driver_is_reported(monkeypatch):
    class Missing:
        @staticmethod
        def cuInit(flags):  # noqa: N802  # CUDA's name
            raise RuntimeError('Failure finding "libcuda.so"')

    with pytest.raises(
        UnsupportedError, match=r"No NVIDIA driver is installed \(libcuda cannot be loaded\). Install one. Use --backend ort"
    ):
        Driver(Missing)


def test_a_driver_without_a_gpu_is_reported():
    api = Api(cuInit=Result.CUDA_ERROR_NO_DEVICE)
    message = r"The NVIDIA driver cannot start \(CUDA_ERROR_NO_DEVICE: as CUDA explains it\). Use --backend ort, openvino or trt."
    with pytest.raises(UnsupportedError, match=message):
        Driver(api)


@pytest.mark.parametrize(("version", "arch"), [(12000, "compute_80"), (12080, "compute_80"), (13000, "sm_86"), (14010, "sm_86")])
def test_a_driver_of_an_older_major_version_gets_ptx(a_gpu, version, arch):
    """Compiled by NVRTC 13.5. Within a major version, an older driver runs a newer compiler's cubin."""
    Driver(Api(version=version)).module(0)
    assert a_gpu == [arch]


def test_a_driver_below_cuda_12_is_refused_before_anything_is_compiled(a_gpu):
    message = r"The NVIDIA driver supports CUDA 11.8; the kernels need a driver for CUDA 12.0 or later. Update the driver."
    with pytest.raises(UnsupportedError, match=message):
        Driver(Api(version=11080)).module(0)
    assert a_gpu == []


def test_ptx_is_announced_with_the_extra_that_compiles_ahead(monkeypatch):
    logged: list[str] = []
    monkeypatch.setattr(driver.log, "warning", lambda message, *values: logged.append(message % values))
    Driver(Api(version=12040)).module(0)
    (line,) = logged
    assert line.startswith("The NVIDIA driver supports CUDA 12.4, and the kernels are compiled by nvrtc 13.5")
    assert "pip install 'edm-deploy[cuda12]'" in line


def test_code_that_does_not_load_is_named():
    api = Api(cuModuleLoadData=Result.CUDA_ERROR_NOT_FOUND)
    with pytest.raises(UnsupportedError, match=r"The kernels for sm_86, /cache/kernels.cubin, cannot be loaded \(CUDA_ERROR_NOT_FOUND"):
        Driver(api).module(0)


def test_a_kernel_that_cannot_start_is_named():
    api = Api(cuLaunchKernel=Result.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)
    message = r"Kernel group_stats_f16 with grid \[4, 2, 1\] cannot be started \(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: as CUDA explains it\)"
    with pytest.raises(UnsupportedError, match=message):
        Driver(api).launch([a_launch()], 0, STREAM)
    api = Api(cuModuleGetFunction=Result.CUDA_ERROR_NOT_FOUND)
    with pytest.raises(UnsupportedError, match="The kernels have no group_stats_f16"):
        Driver(api).launch([a_launch()], 0, STREAM)


def test_an_error_that_ends_cuda_in_the_process_is_a_runtime_error():
    """As torch raises it: the kernel that is named is not the one that failed."""
    with pytest.raises(
        RuntimeError, match=r"CUDA has failed in this process \(CUDA_ERROR_ILLEGAL_ADDRESS.*started earlier.*CUDA_LAUNCH_BLOCKING=1"
    ):
        Driver(Api(cuLaunchKernel=Result.CUDA_ERROR_ILLEGAL_ADDRESS)).launch([a_launch()], 0, STREAM)


def test_without_cuda_bindings_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert "cuda-bindings, which starts the kernels, cannot be imported here" in driver.available()
    assert "pip install 'edm-deploy[cuda]'" in driver.available()


def test_a_torch_without_cuda_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", Api())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"torch {torch.__version__} finds no CUDA device. Install a torch that is built for CUDA." in driver.available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert driver.available() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_this_machine_reports_why_kernels_cannot_run():
    assert driver.available() is not None
    with pytest.raises(UnsupportedError):
        driver.prepare(torch.device("cuda", 0))


THROUGH_THE_BINDING = """
import torch
from pathlib import Path
from edm_deploy.errors import UnsupportedError
from engines.kernels import build, driver
from engines.kernels.launch import Launch, StatsParams

torch.cuda.get_device_capability = lambda index: (8, 6)
elf = b"\\x7fELF" + bytes(60)
build.compiler_in_use = lambda: build.Compiler("nvrtc", (13, 5))
build.cubin = lambda arch, main: build.Cubin(Path("kernels.cubin"), elf, arch, build.Compiler("nvrtc", (13, 5)))
for entry, width, shared_bytes in (("group_stats_f16", 4, 65536), ("group_stats_f16", 7, 0), ("missing", 4, 0)):
    params = StatsParams(N=3, groups=5, eps=0.5)
    try:
        driver._driver().launch([Launch(entry, (width, 2, 1), 256, shared_bytes, params)], 1, 4096)
    except UnsupportedError as err:
        print(err, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in for libcuda is built for Linux")
def test_the_real_binding_carries_names_grids_and_structs(tmp_path):
    """cuda.bindings in a separate process, with libcuda_double.cpp where the driver's library is looked for."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    source = Path(__file__).parent / "helpers" / "libcuda_double.cpp"
    subprocess.run(["g++", "-shared", "-fPIC", f"-I{build.SOURCE}", "-o", tmp_path / "libcuda.so.1", source, "-ldl"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", THROUGH_THE_BINDING], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "group_stats_f16 attribute 8 = 65536",
        "group_stats_f16 attribute 9 = 100",
        "group_stats_f16 grid 4 2 1 block 256 1 1 shared 65536 stream 0x1000 extra (nil): N 3 groups 5 eps 0.5",
        "group_stats_f16 grid 7 2 1 block 256 1 1 shared 0 stream 0x1000 extra (nil): N 3 groups 5 eps 0.5",
        "Kernel group_stats_f16 with grid [7, 2, 1] cannot be started (CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: as CUDA explains it).",
        "The kernels have no missing (CUDA_ERROR_NOT_FOUND: as CUDA explains it).",
    ]

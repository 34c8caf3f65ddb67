"""The plugins as TensorRT's builder meets them, against a double and against NVIDIA's own Python half where that is installed; and their compiled code."""

import importlib
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.export.plugin_schema import CONV, QUANTIZE
from edm_deploy.numerics.kernel_layout import code_bytes
from engines.kernels import tensorrt_plugin
from engines.kernels.build import source_files
from engines.kernels.compilers import compiled, nvrtc_compiler
from engines.kernels.launch import ConvParams, QuantizeParams, conv_launches, quantize_launch
from engines.kernels.tiles import TILES
from tests.engines.kernels.helpers import tensorrt_double
from tests.engines.kernels.helpers.sass import tool
from tests.engines.kernels.helpers.tensorrt_double import DataType

TYPES = {"FP16": DataType.HALF, "FP32": DataType.FLOAT, "INT32": DataType.INT32, "INT8": DataType.INT8}


@pytest.fixture(params=["double", "published"])
def trt(request, monkeypatch):
    module = tensorrt_double.core()
    if request.param == "double":
        tensorrt_double.doubled_plugin(module, monkeypatch)
    elif tensorrt_double.published_plugin(module, monkeypatch) is None:
        pytest.skip("NVIDIA's Python half is not installed (pip install --no-deps tensorrt-cu13-bindings)")
    monkeypatch.setattr(tensorrt_plugin, "_ptx", lambda name, **macros: b"PTX of " + name.encode())
    tensorrt_plugin.register()
    return module


def quantize(trt, x, **attributes):
    shapes = [x, (x[0],), (5,), (5,), (5,)]
    return tensorrt_double.build(trt, QUANTIZE.name, shapes, [TYPES[name] for name in QUANTIZE.types[:-1]], attributes)


def convolve(trt, codes, k, tactic, **attributes):
    n, _, _, cb = codes
    shapes = [codes, (k, attributes["kernel"] ** 2, cb), (5, 16), (n,), (5,), (5,), (k,), (k,), (k,)]
    return tensorrt_double.build(trt, CONV.name, shapes, [TYPES[name] for name in CONV.types[:-1]], attributes, tactic)


@pytest.mark.parametrize(("n", "c", "h", "w"), [(1, 3, 8, 8), (2, 320, 64, 64), (70000, 40, 1, 1), (3, 33, 7, 5)])
def test_a_map_is_quantized_by_the_launch_that_the_torch_operator_makes(trt, n, c, h, w):
    kernel = quantize(trt, (n, c, h, w), bits=4, unsigned_codes=1, channels_last=0)
    cb = code_bytes(c, 4)
    params = QuantizeParams(N=n, HW=h * w, C=c, Cb=cb)
    own = quantize_launch(params, type_name="f16", bits=4, channels_last=False, norm=False, activation="none")
    assert (kernel.grid, kernel.threads, kernel.shared_bytes) == (own.grid, own.threads, 0)
    assert kernel.integers == (n, h * w, c, cb)
    assert (kernel.shape, kernel.dtype) == ((n, h, w, cb), DataType.INT8)
    assert kernel.name == "plugin_quantize_first_u4"


@pytest.mark.parametrize(("n", "length", "c"), [(1, 1, 128), (2, 77, 768), (8, 4096, 320), (70000, 2, 20)])
def test_tokens_are_quantized_by_the_launch_that_the_torch_operator_makes(trt, n, length, c):
    kernel = quantize(trt, (n, length, 1, c), bits=4, unsigned_codes=0, channels_last=1)
    cb = code_bytes(c, 4)
    own = quantize_launch(
        QuantizeParams(N=n, HW=length, C=c, Cb=cb), type_name="f16", bits=4, channels_last=True, norm=False, activation="none"
    )
    assert (kernel.grid, kernel.threads, kernel.integers) == (own.grid, own.threads, (n, length, c, cb))
    assert (kernel.shape, kernel.name) == ((n, length, 1, cb), "plugin_quantize_last_s4")


@pytest.mark.parametrize("tactic", range(1, len(TILES) + 1))
@pytest.mark.parametrize(
    ("codes", "k", "geometry"),
    [
        ((2, 64, 64, 160), 320, (3, 1, 1)),
        ((1, 9, 9, 16), 4, (3, 1, 2)),
        ((3, 17, 16, 48), 33, (3, 0, 2)),
        ((2, 77, 1, 384), 640, (1, 0, 1)),
    ],
)
def test_each_tactic_is_a_tile_launched_as_the_torch_operator_launches_it(trt, codes, k, geometry, tactic):
    kernel, padding, stride = geometry
    got = convolve(trt, codes, k, tactic, bits=4, unsigned_codes=1, kernel=kernel, padding=padding, stride=stride)
    n, h, w, cb = codes
    ones = torch.nn.functional.conv2d(torch.ones(1, 1, h, w), torch.ones(1, 1, kernel, kernel), padding=padding, stride=stride)
    p, q = ones.shape[2:]
    params = ConvParams(N=n, H=h, W=w, Cb=cb, K=k, R=kernel, S=kernel, P=p, Q=q, padding=padding, stride=stride, splits=1)
    (own,) = conv_launches(params, kind="u4", tile=TILES[tactic - 1], type_name="f16")
    assert (got.grid, got.threads, got.shared_bytes) == (own.grid, own.threads, own.shared_bytes)
    assert got.integers == (n, h, w, cb, k, kernel, kernel, p, q, padding, stride)
    assert (got.shape, got.dtype) == ((n, p, q, k), DataType.HALF)
    assert got.name == f"plugin_conv_u4_{TILES[tactic - 1].name}"


def test_eight_bit_codes_have_a_kernel_too(trt):
    assert (
        convolve(trt, (1, 8, 8, 32), 8, 1, bits=8, unsigned_codes=0, kernel=1, padding=0, stride=1).name
        == f"plugin_conv_s8_{TILES[0].name}"
    )


def test_registering_twice_changes_nothing(trt):
    tensorrt_plugin.register()


def test_no_tile_wants_more_shared_memory_than_a_kernel_gets_without_asking():
    """TensorRT launches a plugin's kernel without raising its limit of 48 KB."""
    assert max(tile.shared_bytes for tile in TILES) <= 48 << 10


def test_without_tensorrt_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnsupportedError, match=r"INT4 plugin nodes need TensorRT 10\.9 or newer, which cannot be imported here"):
        tensorrt_plugin.register()


def test_an_older_tensorrt_is_refused_by_its_version(monkeypatch):
    old = types.ModuleType("tensorrt")
    old.__version__ = "10.7.0"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", types.ModuleType("tensorrt.plugin"))
    with pytest.raises(UnsupportedError, match=r"TensorRT 10\.9 or newer; this one is 10\.7\.0"):
        tensorrt_plugin.register()


def codes_of_all():
    yield from (tensorrt_plugin.quantize_code(4, unsigned=u, channels_last=last) for u in (False, True) for last in (False, True))
    yield from (tensorrt_plugin.conv_code(kind, tile) for kind in ("s4", "u4") for tile in (TILES[0], TILES[-1]))


@pytest.fixture(scope="module")
def ptx():
    importlib.import_module("cuda.bindings.nvrtc")
    return dict(codes_of_all())


def test_the_entry_points_take_inputs_integers_output_in_this_order(ptx):
    """TensorRT passes pointers to inputs, then the integers, then pointers to outputs."""
    expected = {
        QUANTIZE.name: ["u64"] * len(QUANTIZE.inputs) + ["u32"] * 4 + ["u64"],
        CONV.name: ["u64"] * len(CONV.inputs) + ["u32"] * 11 + ["u64"],
    }
    for name, code in ptx.items():
        (entry,) = re.findall(rf"\.visible \.entry {name}\((.*?)\)", code.decode(), re.DOTALL)
        assert re.findall(r"\.param \.(\w+)", entry) == expected[QUANTIZE.name if "quantize" in name else CONV.name]


def test_the_code_runs_on_drivers_of_cuda_12(ptx):
    for code in ptx.values():
        assert re.findall(rb"^\.version (.*)$", code, re.MULTILINE) == [b"8.0"]
        assert b".target sm_80" in code


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no CUDA toolkit, whose ptxas assembles PTX")
def test_the_code_assembles_for_every_gpu_it_is_meant_for(ptx, tmp_path):
    for name, code in ptx.items():
        (tmp_path / "x.ptx").write_bytes(code)
        for arch in ("sm_80", "sm_86", "sm_89", "sm_90"):
            command = ["ptxas", f"-arch={arch}", "-v", "-o", tmp_path / "x.cubin", tmp_path / "x.ptx"]
            assembled = subprocess.run(command, capture_output=True, text=True, check=False)
            assert assembled.returncode == 0, f"{name} for {arch}: {assembled.stderr}"
            assert arch == "sm_90" or "spill" not in assembled.stderr or "0 bytes spill stores" in assembled.stderr


@pytest.mark.parametrize(("kind", "instruction"), [("s4", "IMMA.16864.S4.S4"), ("u4", "IMMA.16864.U4.S4"), ("s8", "IMMA.16832.S8.S8")])
def test_a_convolution_is_tensor_core_instructions_of_its_kind_on_sm_86(kind, instruction, tmp_path):
    recorded = {}

    def record(name, **macros):
        recorded.update(name=name, source=tensorrt_plugin.entry_source(name, macros))
        return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_plugin, "_ptx", record)
        tensorrt_plugin.conv_code(kind, TILES[2])
    cubin = compiled(source_files() | {"entry.cu": recorded["source"]}, "entry.cu", "sm_86", nvrtc_compiler())
    (tmp_path / "x.cubin").write_bytes(cubin)
    sass = subprocess.run([tool("nvdisasm"), "-c", tmp_path / "x.cubin"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"IMMA\.\w+\.\w+\.\w+", sass)) == {instruction}

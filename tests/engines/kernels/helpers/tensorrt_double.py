"""TensorRT in two halves, for tests where it cannot be installed.

`core` doubles the C++ half: types, symbolic dimensions, the registry. `doubled_plugin` doubles as much of the Python half, `tensorrt.plugin`, as our plugins
use, and is stricter than it. `published_plugin` loads NVIDIA's own Python half on top of `core`, where the package tensorrt_cu12_bindings or
tensorrt_cu13_bindings is installed (without the libraries it needs no GPU). `build` then runs either what TensorRT's builder asks.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
import types
import typing
from dataclasses import dataclass

import numpy as np

DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 INT64 BF16 INT4 FP8")
Operation = enum.Enum("DimensionOperation", "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV")
ARITHMETIC = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "SUB": lambda a, b: a - b,
    "MAX": max,
    "MIN": min,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class Dimension:
    """An IDimensionExpr whose value the double has, and the plugin may read only if it is a constant."""

    def __init__(self, value=0, constant=False):
        self.value, self.constant = value, constant

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        assert self.constant, "a plugin asked for the value of a dynamic dimension"
        return self.value


class ExprBuilder:
    def constant(self, value):
        return Dimension(value, constant=True)

    def operation(self, operation, first, second):
        return Dimension(ARITHMETIC[operation.name](first.value, second.value), first.constant and second.constant)


@dataclass
class PluginField:
    name: str
    data: typing.Any
    type: typing.Any = None


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        assert (creator.name, namespace) not in self.creators, "TensorRT refuses a second creator of one name"
        self.creators[creator.name, namespace] = creator

    def get_creator(self, name, version, namespace):
        assert version == "1"
        return self.creators.get((name, namespace))


def core():
    """A module `tensorrt` without `plugin`."""
    trt = types.ModuleType("tensorrt")
    registry = Registry()
    for name in [
        "IPluginV3",
        "IPluginV3QuickCore",
        "IPluginV3QuickBuild",
        "IPluginV3QuickAOTBuild",
        "IPluginV3QuickRuntime",
        "IPluginCreatorV3Quick",
        "ISymExpr",
        "ITensor",
    ]:
        setattr(trt, name, type(name, (), {}))
    trt.__version__ = "11.4.0.106"
    trt.DataType, trt.DimensionOperation, trt.IDimensionExpr, trt.IExprBuilder = DataType, Operation, Dimension, ExprBuilder
    trt.float32, trt.float16, trt.int8, trt.int32 = DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.INT32
    trt.TensorFormat = enum.Enum("TensorFormat", "LINEAR HWC CHW32")
    trt.TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")
    trt.QuickPluginCreationRequest = enum.Enum("QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT")
    trt.PluginFieldType = enum.Enum("PluginFieldType", "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN")
    trt.PluginArgType = enum.Enum("PluginArgType", "INT")
    trt.PluginArgDataType = enum.Enum("PluginArgDataType", "INT8 INT16 INT32")
    trt.Dims = type("Dims", (), {"MAX_DIMS": 8})
    trt.DimsExprs = lambda length: [None] * length
    trt.PluginField, trt.PluginFieldCollection = PluginField, list
    for name in ("PluginTensorDesc", "DynamicPluginTensorDesc"):
        setattr(trt, name, type(name, (), {}))
    trt.Logger = type("Logger", (), {"WARNING": 1, "log": lambda self, severity, message: None})
    trt.get_plugin_registry = lambda: registry
    return trt


def published_plugin(trt, monkeypatch):
    """NVIDIA's `tensorrt.plugin` on top of `trt`, or None where its package is not installed."""
    spec = importlib.util.find_spec("tensorrt_bindings")  # found, not imported: its C++ half wants libraries
    if spec is None or not spec.submodule_search_locations:
        return None
    trt.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    for name in [name for name in sys.modules if name.startswith("tensorrt.plugin")]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("tensorrt.plugin")


def doubled_plugin(trt, monkeypatch):
    """A module `tensorrt.plugin`: what our plugins use of it, no more."""
    from tests.engines.kernels.helpers import plugin_double

    module = plugin_double.module(trt)
    trt.plugin = module
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
    return module


@dataclass(frozen=True)
class Kernel:
    """What TensorRT would put into the engine: the kernel's name and code, its launch, its integers, and the output's shape and type."""

    name: str
    code: bytes
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    integers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: DataType


def build(trt, name, shapes, dtypes, attributes, tactic=None):
    """Call a registered plugin as the builder does, in its order; TensorRT times every tactic, here one is given."""
    creator = trt.get_plugin_registry().get_creator(name, "1", "edm_deploy")
    # As the ONNX parser hands them over: in the creator's own order, integers as int64.
    fields = [PluginField(field.name, np.array([attributes[field.name]], dtype=np.int64)) for field in creator.field_names]
    plugin = creator.create_plugin(name, "edm_deploy", fields, trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT)
    (dtype,) = plugin.get_output_data_types(list(dtypes), [len(shape) for shape in shapes])
    # The batch is dynamic, all else is fixed.
    dimensions = [[Dimension(size, constant=axis > 0) for axis, size in enumerate(shape)] for shape in shapes]
    (output,) = plugin.get_output_shapes(dimensions, [], ExprBuilder())
    described = [
        _described(trt, shape, type_)
        for shape, type_ in zip([*shapes, tuple(each.value for each in output)], [*dtypes, dtype], strict=True)
    ]
    supported = plugin.get_supported_format_combinations(described, len(shapes))
    assert [desc.type for desc in supported] == [*dtypes, dtype]
    assert {desc.format for desc in supported} == {trt.TensorFormat.LINEAR}
    plugin.configure_plugin(described[:-1], described[-1:])
    tactics = plugin.get_valid_tactics()
    assert tactic in tactics if tactics else tactic is None
    plugin.set_tactic(tactic or 0)
    launch, integers = types.SimpleNamespace(), Integers()
    plugin.get_launch_params(dimensions, described, len(shapes), launch, integers, ExprBuilder())
    kernel, code = plugin.get_kernel([each.desc for each in described[:-1]], [each.desc for each in described[-1:]])
    grid = tuple(getattr(launch, f"grid_{axis}").expr.value for axis in "xyz")
    assert launch.block_y.expr.value == launch.block_z.expr.value == 1
    return Kernel(
        kernel,
        code,
        grid,
        launch.block_x.expr.value,
        launch.shared_mem.expr.value,
        tuple(integers),
        tuple(each.value for each in output),
        dtype,
    )


class Integers(list):
    """Where the plugin puts its integers; each must be of 32 bits."""

    nbSymExprs = 0  # noqa: N815  TensorRT spells it so

    def __setitem__(self, index, value):
        assert value.dtype.name == "INT32"
        assert index == len(self) < self.nbSymExprs
        self.append(value.expr.value)


def _described(trt, shape, dtype):
    described = trt.DynamicPluginTensorDesc()
    described.desc = trt.PluginTensorDesc()
    described.desc.dims, described.desc.type, described.desc.format, described.desc.scale = shape, dtype, trt.TensorFormat.LINEAR, 1.0
    described.opt = described.min = described.max = shape
    return described

"""As much of `tensorrt.plugin` as our plugins use, and stricter: what NVIDIA's validates late or not at all is refused here at once."""

from __future__ import annotations

import inspect
import types
import typing


def module(trt):
    """The module, on top of a `tensorrt` from `tensorrt_double.core`."""
    trtp = types.ModuleType("tensorrt.plugin")
    builder: list = []  # the expression builder, while TensorRT requests shapes

    class SymInt32:
        def __init__(self, value=None):
            assert value is None or isinstance(value, int | SymInt32 | trt.IDimensionExpr), value
            self.fake = value is None or (isinstance(value, SymInt32) and value.fake) or (isinstance(value, int) and not builder)
            self.expr = (
                value.expr if isinstance(value, SymInt32) else builder[-1].constant(value) if isinstance(value, int) and builder else value
            )

        def _op(self, operation, other):
            other = other if isinstance(other, SymInt32) else SymInt32(other)
            fake = self.fake or other.fake
            return SymInt32() if fake else SymInt32(builder[-1].operation(trt.DimensionOperation[operation], self.expr, other.expr))

        def __add__(self, other):
            return self._op("SUM", other)

        def __sub__(self, other):
            return self._op("SUB", other)

        def __mul__(self, other):
            return self._op("PROD", other)

        def __floordiv__(self, other):
            return self._op("FLOOR_DIV", other)

        def __bool__(self):
            raise RuntimeError("a symbolic dimension has no truth")

        __index__ = __int__ = None

        def __call__(self):
            return types.SimpleNamespace(dtype=trt.PluginArgDataType.INT32, expr=self.expr)

    class TensorDesc:
        def __init__(self, shape_expr, dtype):
            assert all(isinstance(size, SymInt32) for size in shape_expr) and isinstance(dtype, trt.DataType)
            self.shape_expr, self.dtype = tuple(shape_expr), dtype

    class KernelLaunchParams:
        def __init__(self, grid_x=1, grid_y=1, grid_z=1, block_x=1, block_y=1, block_z=1, shared_mem=0):
            for name, value in [pair for pair in locals().items() if pair[0] != "self"]:
                setattr(self, name, value)

        def __setattr__(self, name, value):
            assert name in inspect.signature(KernelLaunchParams).parameters, name
            object.__setattr__(self, name, SymInt32(value))

    class SymIntExprs(list):
        @classmethod
        def from_tuple(cls, values):
            assert isinstance(values, tuple) and all(isinstance(value, SymInt32) for value in values)
            return cls(values)

    class AutoTuneCombination:
        def __init__(self, io_types, layouts, tactics=None):
            assert tactics is None or all(tactic > 0 for tactic in tactics)
            self.types = [trt.DataType[{"FP32": "FLOAT", "FP16": "HALF"}.get(name.strip(), name.strip())] for name in io_types.split(",")]
            self.layout, self.tactics = trt.TensorFormat[layouts], tactics

    class Creator:
        def __init__(self, definition):
            self.definition, self.name = definition, definition.id.split("::")[1]
            self.field_names = [types.SimpleNamespace(name=name) for name in definition.attributes]

        def create_plugin(self, name, namespace, fields, phase, request):
            assert request == trt.QuickPluginCreationRequest.STRICT_AOT and f"{namespace}::{name}" == self.definition.id
            return Instance(self.definition, {field.name: int(field.data[0]) for field in fields})

    class Instance:
        def __init__(self, definition, attributes):
            self.definition, self.attributes = definition, attributes

        def get_output_data_types(self, dtypes, ranks):
            inputs = [TensorDesc([SymInt32()] * rank, dtype) for dtype, rank in zip(dtypes, ranks, strict=True)]
            return [self.definition.describe(*inputs, **self.attributes).dtype]

        def get_output_shapes(self, inputs, shape_inputs, expr_builder):
            self.sizes = inputs
            builder.append(expr_builder)
            try:
                self.inputs = [TensorDesc([SymInt32(size) for size in shape], trt.DataType.FLOAT) for shape in inputs]
                self.output = self.definition.describe(*self.inputs, **self.attributes)
                return [[size.expr for size in self.output.shape_expr]]
            finally:
                builder.pop()

        def get_supported_format_combinations(self, in_out, num_inputs):
            (only,) = self.definition.formats(*self.inputs, (self.output,))
            self.tactics = only.tactics
            return [types.SimpleNamespace(type=type_, format=only.layout) for type_ in only.types]

        def configure_plugin(self, inputs, outputs):
            pass

        def get_valid_tactics(self):
            return self.tactics or []

        def set_tactic(self, tactic):
            self.tactic = tactic

        def get_launch_params(self, sizes, in_out, num_inputs, launch, setter, expr_builder):
            builder.append(expr_builder)
            try:
                # Positional, as NVIDIA's calls it.
                name, code, params, integers = self.definition.kernel(*self.inputs, *self.attributes.values(), (self.output,), self.tactic)
                assert (
                    isinstance(name, str)
                    and isinstance(code, bytes)
                    and isinstance(params, KernelLaunchParams)
                    and isinstance(integers, SymIntExprs)
                )
                self.kernel = name, code
                for field in inspect.signature(KernelLaunchParams).parameters:
                    setattr(launch, field, getattr(params, field)())
                setter.nbSymExprs = len(integers)
                for index, value in enumerate(integers):
                    setter[index] = value()
            finally:
                builder.pop()

        def get_kernel(self, inputs, outputs):
            return self.kernel

    def expect(function, names, returns):
        signature = inspect.signature(function)
        assert list(signature.parameters) == names, f"({', '.join(signature.parameters)}), expected ({', '.join(names)})"
        assert signature.return_annotation == returns, signature.return_annotation

    trtp.op = types.SimpleNamespace()
    definitions = {}

    def register(plugin_id):
        def decorate(function):
            namespace, name = plugin_id.split("::")
            signature = inspect.signature(function)
            assert signature.return_annotation is TensorDesc
            annotations = [parameter.annotation for parameter in signature.parameters.values()]
            attributes = [name for name, parameter in signature.parameters.items() if parameter.annotation is int]
            assert annotations == [TensorDesc] * (len(annotations) - len(attributes)) + [int] * len(attributes), (
                "tensors first, each annotated"
            )
            definition = types.SimpleNamespace(id=plugin_id, describe=function, names=list(signature.parameters), attributes=attributes)
            definitions[plugin_id] = definition
            if not hasattr(trtp.op, namespace):
                setattr(trtp.op, namespace, types.SimpleNamespace())
            assert not hasattr(getattr(trtp.op, namespace), name), "registered twice"
            setattr(getattr(trtp.op, namespace), name, definition)
            trt.get_plugin_registry().register_creator(Creator(definition), namespace)
            return function

        return decorate

    def autotune(plugin_id):
        def decorate(function):
            definition = definitions[plugin_id]
            tensors = definition.names[: len(definition.names) - len(definition.attributes)]
            expect(function, [*tensors, "outputs"], list[AutoTuneCombination])
            definition.formats = function
            return function

        return decorate

    def aot_impl(plugin_id):
        def decorate(function):
            definition = definitions[plugin_id]
            expect(function, [*definition.names, "outputs", "tactic"], tuple[str, bytes, KernelLaunchParams, SymIntExprs])
            definition.kernel = function
            return function

        return decorate

    def symbolic(operation):
        def apply(first, second):
            assert isinstance(first, SymInt32) or isinstance(second, SymInt32), "TensorRT refuses two plain integers"
            return (first if isinstance(first, SymInt32) else SymInt32(first))._op(operation, second)

        return apply

    public: dict[str, typing.Any] = {
        "TensorDesc": TensorDesc,
        "KernelLaunchParams": KernelLaunchParams,
        "SymInt32": SymInt32,
        "SymIntExprs": SymIntExprs,
        "AutoTuneCombination": AutoTuneCombination,
        "register": register,
        "autotune": autotune,
        "aot_impl": aot_impl,
        "cdiv": symbolic("CEIL_DIV"),
        "min": symbolic("MIN"),
        "from_shape_expr": lambda shape, dtype: TensorDesc(
            [size if isinstance(size, SymInt32) else SymInt32(size) for size in shape], dtype
        ),
    }
    for name, value in public.items():
        setattr(trtp, name, value)
    return trtp

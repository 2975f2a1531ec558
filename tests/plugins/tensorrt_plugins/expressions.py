"""What TensorRT's absent builder gives to plugins: dimensions, an expression builder, and where launches are noted.

The builder works with numbers at once. Its dimensions are objects of the real bindings' `IDimensionExpr`, which has no
constructor: memory of ours is passed for C++ objects through pybind11's conduit, and read back as the bindings' own.
Nobody asks such an object anything, but the type that it claims to be.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]


# Its table of virtual functions, facts, and the expression at the end.
_SYMBOL_WORDS = 4


def _address_in(capsule: Any) -> int:
    return int(_pointer_in(capsule, _name_of(capsule)))


class _Memory:
    """An object with a table of virtual functions: no functions, but its C++ type before them, as C++ has it."""

    def __init__(self) -> None:
        self.table = (ctypes.c_void_p * 10)()
        self.object = (ctypes.c_void_p * 2)(ctypes.addressof(self.table) + 2 * ctypes.sizeof(ctypes.c_void_p))

    @property
    def address(self) -> int:
        return ctypes.addressof(self.object)

    def _pybind11_conduit_v1_(self, abi: bytes, cpp_type: Any, kind: bytes) -> Any:
        self.table[1] = _address_in(cpp_type)
        return _new_capsule(self.address, b"IDimensionExpr", None)


class Numbers:
    """An `IExprBuilder` whose expressions are numbers already."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt
        self._kept: list[tuple[_Memory, Any]] = []
        self._values: dict[int, int] = {}

    def constant(self, value: int) -> Any:
        memory = _Memory()
        dimensions = self._trt.DimsExprs(1)
        dimensions[0] = memory
        expression = dimensions[0]
        assert isinstance(expression, self._trt.IDimensionExpr)
        self._kept.append((memory, expression))
        self._values[memory.address] = value
        return expression

    def operation(self, operation: Any, first: Any, second: Any) -> Any:
        a, b = self.value(first), self.value(second)
        kinds = self._trt.DimensionOperation
        results = {
            kinds.SUM: lambda: a + b,
            kinds.PROD: lambda: a * b,
            kinds.FLOOR_DIV: lambda: a // b,
            kinds.CEIL_DIV: lambda: -(-a // b),
        }
        return self.constant(results[operation]())

    def dimensions(self, sizes: list[int]) -> Any:
        """A real `DimsExprs`."""
        dimensions = self._trt.DimsExprs(len(sizes))
        for axis, size in enumerate(sizes):
            dimensions[axis] = self.constant(size)
        return dimensions

    def value(self, expression: Any) -> int:
        """The number that an expression of this builder is."""
        address = next(memory.address for memory, kept in self._kept if kept is expression)
        return self._values[address]

    def value_in(self, symbol: Any) -> int:
        """The number of the expression that a real `ISymExpr` holds.

        Python may set it but not read it, so it is looked up in the C++ object, to which the Python object points.
        """
        start = ctypes.c_void_p.from_address(id(symbol) + object.__basicsize__).value
        assert start is not None
        words = (ctypes.c_void_p * _SYMBOL_WORDS).from_address(start)
        (value,) = (self._values[word] for word in words if word in self._values)
        return value


class Scalars:
    """Stands for the list of a launch's extra arguments."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.symbols: dict[int, Any] = {}

    def __setitem__(self, index: int, symbol: Any) -> None:
        assert index < self.nbSymExprs
        self.symbols[index] = symbol


def launch_parameters() -> SimpleNamespace:
    """Stands for the `KernelLaunchParams` that the builder hands out."""
    return SimpleNamespace()

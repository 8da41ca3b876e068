"""A graph under construction: short names, small constants, and the many ways to write an integer operand."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

FLOAT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
DTYPES = tuple(FLOAT_TYPES)
OPERANDS = ("initializer", "constant", "constant-ints", "cast-reshape", "sum")
"""How a static integer operand may be written; the last two are computed."""


class Scope:
    """The body of a graph, subgraph or function.

    Attributes:
        opset: version of the default domain, which decides how operands are written.
        inline: whether constants are Constant nodes, as in a function.
        operands: how integer operands are written, one of ``OPERANDS``.
        nodes: in topological order.
        initializers: by name.
        outputs: further outputs, beside the body's own.
        inputs: name -> type and shape of graph inputs that the body reads, in whatever scope it is.
        functions: model-local functions that it calls.
        declared: types of values that shape inference does not find.
        domains: of the operators that it and its subgraphs use, beside the default one.
    """

    def __init__(self, opset: int, *, inline: bool = False, operands: str = "initializer") -> None:
        self.opset = opset
        self.inline = inline
        self.operands = operands
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.outputs: list[onnx.ValueInfoProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.declared: list[onnx.ValueInfoProto] = []
        self.domains: set[str] = set()
        self._names: set[str] = set()

    def child(self, *, captures: bool) -> Scope:
        """Returns the scope of a subgraph; where it ``captures``, its constants are those of this scope."""
        inner = Scope(self.opset, inline=self.inline, operands=self.operands)
        inner.inputs, inner.domains = self.inputs, self.domains
        inner._names = set(self._names)
        if captures and not self.inline:
            inner.initializers = self.initializers
        return inner

    def close(
        self, inner: Scope, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.GraphProto:
        """Returns the subgraph of a child, whose names are taken from now on."""
        self._names |= inner._names
        own = [] if inner.initializers is self.initializers else list(inner.initializers.values())
        outs = [*outputs, *inner.outputs]
        return helper.make_graph(inner.nodes, "body", list(inputs), outs, own, value_info=inner.declared)

    def opsets(self) -> list[onnx.OperatorSetIdProto]:
        """Returns the operator sets that the nodes need."""
        return [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node and returns its output."""
        return self.ops(op_type, *inputs, count=1, name=name, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, count: int, name: str = "", **attributes: Any) -> list[str]:
        """Adds a node and returns its outputs."""
        stem = self._fresh(name or op_type.lower())
        outputs = [stem] if count == 1 else [f"{stem}_out{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, name=f"{stem}_node", **attributes))
        return outputs

    def contrib(self, op_type: str, *inputs: str, dtype: str, shape: Sequence[int | str], **attributes: Any) -> str:
        """Adds a com.microsoft node and returns its output, whose type shape inference would not find.

        Args:
            op_type: the operator.
            inputs: by slot; empty where one is left out.
            dtype: of the output.
            shape: of the output.
            attributes: of the node.
        """
        held = list(inputs)
        while not held[-1]:
            held.pop()
        self.domains.add("com.microsoft")
        output = self.op(op_type, *held, domain="com.microsoft", **attributes)
        self.declared.append(floats(output, dtype, shape))
        return output

    def total(self, values: Sequence[str]) -> str:
        """Writes the sum of values, one Add after the other."""
        total = values[0]
        for value in values[1:]:
            total = self.op("Add", total, value)
        return total

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """Adds a constant; the same name with the same contents is one constant."""
        tensor = numpy_helper.from_array(array, name)
        if self.inline:
            if name not in self._names:
                self._names.add(name)
                self.nodes.append(helper.make_node("Constant", [], [name], name=f"{name}_node", value=tensor))
            return name
        self.initializers[name] = tensor
        return name

    def weight(self, name: str, shape: Sequence[int], dtype: str) -> str:
        """Adds a weight whose contents follow from its name: short decimals that float16 holds exactly."""
        return self.constant(name, weight(name, shape, dtype))

    def ints(self, *values: int, scalar: bool = False, dtype: type[np.integer[Any]] = np.int64) -> str:
        """Adds a static integer operand, written as ``operands`` says; equal operands share what they are made of."""
        array = np.array(values[0] if scalar else values, dtype=dtype)
        bits = "" if dtype is np.int64 else f"_{array.dtype}"
        name = "_".join(["scalar" if scalar else "ints", *(str(v).replace("-", "m") for v in values)]) + bits
        if self.operands == "constant-ints" and dtype is np.int64 and self.opset >= 12:
            held: dict[str, Any] = {"value_int": values[0]} if scalar else {"value_ints": list(values)}
            return self.op("Constant", name=name, **held)
        if self.operands in ("constant", "constant-ints"):
            return self.op("Constant", name=name, value=numpy_helper.from_array(array))
        small = all(abs(v) < 2**30 for v in values)
        if self.operands == "cast-reshape" and small:
            narrow = self.op("Identity", self.constant(f"{name}_i32", array.astype(np.int32).reshape(-1)))
            shape = self.constant(f"{name}_shape", np.array(array.shape, dtype=np.int64))
            shaped = self.op("Reshape", narrow, shape)
            return self.op("Cast", shaped, to=helper.np_dtype_to_tensor_dtype(array.dtype))
        if self.operands == "sum" and small:
            less = self.constant(f"{name}_less_one", array - np.array(1, dtype=dtype))
            return self.op("Add", less, self.constant(f"one{bits}", np.array(1, dtype=dtype)))
        return self.constant(name, array)

    def expose(self, name: str, dtype: str) -> None:
        """Makes a value that exists already a further output of the body."""
        if name not in [value.name for value in self.outputs]:
            self.outputs.append(floats(name, dtype))

    def expose_constant(self, name: str) -> None:
        """Makes a constant of this graph a further output of it."""
        tensor = self.initializers[name]
        self.outputs.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))

    def _fresh(self, stem: str) -> str:
        name, count = stem, 1
        while name in self._names or name in self.initializers:
            name = f"{stem}_{count}"
            count += 1
        self._names.add(name)
        return name


def small_weight(name: str, shape: Sequence[int], dtype: str, k: int) -> npt.NDArray[Any]:
    """Returns a weight whose products with K inputs stay near 1, so that float16 holds what layers of them compute."""
    small: npt.NDArray[Any] = weight(name, shape, dtype) / np.array(2 ** math.ceil(math.log2(k) / 2), dtype)
    return small


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Draws a dimension: 1 at its plainest, mostly one that blocks divide."""
    return st.sampled_from([size for size in (1, 16, 32, 64, 5, 16, 32, 64, 22) if size <= largest])


def floats(name: str, dtype: str, shape: Sequence[int | str] | None = None) -> onnx.ValueInfoProto:
    """Returns the declaration of a float value."""
    return helper.make_tensor_value_info(name, FLOAT_TYPES[dtype], shape)


def weight(name: str, shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
    """Returns a weight of 1/32nds in (-2, 2): no two experts or columns are alike, and it prints in little space."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return (generator.integers(-63, 64, math.prod(shape)) / 32).astype(dtype).reshape(tuple(shape))

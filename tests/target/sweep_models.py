"""Models for the sweep of what rules write: experts, linear maps and tables, of which nothing is ever read."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Experts = tuple[ir.DataType, tuple[int, int], Mapping[str, object], bool, int]
"""Of an MoE: element type, H and I, attributes (and ``fc3``), whether it has biases, rank of x."""


def made_once(make: Callable[..., ir.Model], *asked: object) -> ir.Model:
    """Returns the model that ``make`` returns for such arguments: rewriting leaves it as it is."""
    key = make.__name__, repr(asked)
    if key not in _MADE:
        _MADE[key] = make(*asked)
    return _MADE[key]


_MADE: dict[tuple[str, str], ir.Model] = {}


class _Graph:
    """A graph whose weights take no memory: nothing reads them before they are written."""

    def __init__(self) -> None:
        self.inputs: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.outputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []

    def fed(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        own = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        return self.inputs.setdefault(name, own)

    def weight(self, dtype: ir.DataType, *shape: int) -> ir.Value:
        name = f"w{len(self.initializers)}"
        array = np.broadcast_to(np.ones((), dtype.numpy()), shape)
        tensor = ir.tensor(array, dtype=dtype, name=name)
        self.initializers.append(
            ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        )
        return self.initializers[-1]

    def op(
        self,
        name: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, object],
        dtype: ir.DataType,
        shape: tuple[int | str, ...],
        *,
        last: bool = True,
        domain: str = "",
        called: str = "",
    ) -> ir.Value:
        node = ir.node(name, inputs, dict(attributes), domain=domain, name=f"{called}n{len(self.nodes)}")
        out = node.outputs[0]
        out.name, out.type, out.shape = f"v{len(self.nodes)}", ir.TensorType(dtype), ir.Shape(shape)
        self.nodes.append(node)
        self.outputs += [out] * last
        return out

    def model(self) -> ir.Model:
        opsets = {"": 21, "com.microsoft": 1}
        graph = ir.Graph(
            list(self.inputs.values()),
            self.outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=opsets,
            name="g",
        )
        return ir.Model(graph, ir_version=10)


def experts_model(nodes: Mapping[str, Experts]) -> ir.Model:
    """Returns a model of MoE nodes, whose names begin as they are named."""
    g = _Graph()
    for name, (dtype, (h, i), attributes, bias, rank) in nodes.items():
        own = dict(attributes)
        fc3, experts = bool(own.pop("fc3", False)), 4
        lead: tuple[int | str, ...] = ("T",) if rank == 2 else ("B", "S")
        x = g.fed(f"x_{dtype.name}_{h}_{rank}", dtype, *lead, h)
        router = g.fed(f"router_{dtype.name}", dtype, "T" if rank == 2 else "BS", experts)
        wide = 2 * i if own.get("swiglu_fusion") else i
        sizes = [(wide, h), (h, i), *[(i, h)] * fc3]
        inputs: list[ir.Value | None] = [x, router]
        for size in sizes:
            inputs += [g.weight(dtype, experts, *size), g.weight(dtype, experts, size[0]) if bias else None]
        g.op("MoE", inputs, own, dtype, (*lead, h), domain="com.microsoft", called=f"{name}_")
    return g.model()


def constants_model(
    drawn: Mapping[str, tuple[Sequence[tuple[int, int]], Sequence[int]]], types: Sequence[ir.DataType]
) -> ir.Model:
    """Returns a model of MatMul, Gemm with a bias, embeddings, such as are tied, and stacks of experts.

    Args:
        drawn: how names of nodes begin -> K and N of what MatMul reads, K of tables.
        types: of elements.
    """
    g = _Graph()
    ids = g.fed("ids", ir.DataType.INT64, "T")
    for name, (sizes, widths) in drawn.items():
        op = functools.partial(g.op, called=f"{name}_")
        for dtype, (k, n) in itertools.product(types, sizes):
            x = g.fed(f"x_{dtype.name}_{k}", dtype, "T", k)
            op("MatMul", [x, g.weight(dtype, k, n)], {}, dtype, ("T", n))
        for dtype in types:
            x = g.fed(f"x_{dtype.name}_512", dtype, "T", 512)
            op("Gemm", [x, g.weight(dtype, 512, 128), g.weight(dtype, 128)], {}, dtype, ("T", 128))
        for dtype, k in itertools.product(types, widths):
            op("Gather", [g.weight(dtype, 64, k), ids], {}, dtype, ("T", k))
            table = g.weight(dtype, 64, k)
            rows = op("Gather", [table, ids], {}, dtype, ("T", k), last=False)
            columns = op("Transpose", [table], {"perm": [1, 0]}, dtype, (k, 64), last=False)
            op("MatMul", [rows, columns], {}, dtype, ("T", 64))
            op("Gather", [g.weight(dtype, 4, 32, k), ids], {}, dtype, ("T", 32, k))
    return g.model()

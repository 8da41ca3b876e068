"""How each strategy draws its models: the choices, in the order in which they shrink."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rewriter.testing._blocks import Block, write_block
from rewriter.testing._consumers import consume
from rewriter.testing._graph import FLOAT_TYPES, OPERANDS, Scope, floats
from rewriter.testing._placements import finish, outer_shape, place
from rewriter.testing._spellings import Matrix, Stack, select, spellings

OPSETS = (21, 18, 13, 11)
NAMES = ("named", "unnamed", "clash")
OBSTACLES = (
    "dynamic-index",
    "stack-read-whole",
    "stack-is-input",
    "stack-is-output",
    "output-in-chain",
    "half-stack",
)
"""What keeps a selection from being folded, or makes it subtle; each model has at most one."""
HINDRANCES = ("constant-node", "several-matrices", "weight-also-read", "weight-is-input", "weight-is-output")
"""What keeps a weight from being quantized, or makes it subtle; each model has at most one."""


@st.composite
def unrolled(
    draw: st.DrawFn,
    experts: int,
    size: int,
    dtypes: tuple[str, ...],
    placements: tuple[str, ...],
    selections: tuple[str, ...],
    consumers: tuple[str, ...],
    obstacles: tuple[str, ...],
    names: tuple[str, ...],
    typed: bool | None,
    repeats: bool,
) -> ir.Model:
    dtype = draw(st.sampled_from(dtypes))
    k, n = draw(st.integers(1, size)), draw(st.integers(1, size))
    count = draw(st.integers(1, experts))
    placement = draw(st.sampled_from(placements))
    obstacle = draw(st.sampled_from(("", *obstacles)))
    transposed = draw(st.booleans())
    axis = draw(st.sampled_from((0, 0, 0, 1, 2)))
    rows, columns = (n, k) if transposed else (k, n)
    stored = "float16" if obstacle == "half-stack" else dtype
    stack = Stack("W", count, rows, columns, stored, axis)
    scope = Scope(draw(st.sampled_from(OPSETS)), operands=draw(st.sampled_from(OPERANDS)))
    naming = draw(st.sampled_from(names))
    scope.inputs["x"] = floats("x", dtype, ["T", k])

    def body(inner: Scope, x: str) -> str:
        inner.weight(stack.name, stack.shape, stored)
        which = st.lists(st.integers(0, count - 1), min_size=1, max_size=experts, unique=not repeats)
        products = []
        for expert in draw(which):
            consumer = draw(st.sampled_from(consumers))
            how = draw(spellings(selections))
            matrix = select(inner, stack, expert, how, rank3=consumer.startswith("matmul"))
            if obstacle == "output-in-chain":
                inner.expose(draw(st.sampled_from(matrix.chain)), stored)
            if stored != dtype:
                matrix = replace(matrix, name=inner.op("Cast", matrix.name, to=FLOAT_TYPES[dtype]))
            product = consume(draw, inner, x, matrix, (k, n), dtype, how, consumer, transposed=transposed)
            if draw(st.integers(0, 3)) == 3:
                again = consume(draw, inner, x, matrix, (k, n), dtype, how, consumer, transposed=transposed)
                product = inner.op("Add", product, again)
            products.append(product)
        products += _obstruct(inner, x, stack, dtype, obstacle)
        if naming == "clash":
            products += _clash(inner, n, dtype)
        total = products[0]
        for product in products[1:]:
            total = inner.op("Add", total, product)
        return total

    captures = draw(st.booleans())
    output = place(body, placement, dtype, captures=captures)(scope, "x")
    if obstacle == "stack-is-output" and stack.name in scope.initializers:
        scope.expose(stack.name, stored)
    overridable = (stack.name,) if obstacle == "stack-is-input" and stack.name in scope.initializers else ()
    shape = [*outer_shape(placement), "T", n]
    return finish(
        scope,
        output,
        dtype,
        shape,
        overridable=overridable,
        typed=_typed(draw, typed),
        named=naming != "unnamed",
    )


def _obstruct(scope: Scope, x: str, stack: Stack, dtype: str, obstacle: str) -> list[str]:
    """Writes the other readers of the stack that the obstacle asks for; returns what is to be added to the output."""
    if obstacle == "stack-read-whole":
        return [_widened(scope, scope.op("ReduceMax", stack.name, keepdims=0), stack, dtype)]
    if obstacle == "dynamic-index":
        scope.inputs["i"] = helper.make_tensor_value_info("i", TensorProto.INT64, [])
        picked = scope.op("Gather", stack.name, "i", axis=stack.axis)
        return [_widened(scope, scope.op("ReduceMax", picked, keepdims=0), stack, dtype)]
    return []


def _widened(scope: Scope, value: str, stack: Stack, dtype: str) -> str:
    return value if stack.dtype == dtype else scope.op("Cast", value, to=FLOAT_TYPES[dtype])


def _clash(scope: Scope, n: int, dtype: str) -> list[str]:
    """Writes values that already have the names that a rule would choose."""
    bias = scope.weight("W__slice_0", (n,), dtype)
    return [scope.op("Identity", bias, name="W__slice_0__T"), scope.op("Identity", bias, name="W__slice_1")]


@st.composite
def moe(
    draw: st.DrawFn,
    experts: int,
    size: int,
    layers: int,
    dtypes: tuple[str, ...],
    placements: tuple[str, ...],
    selections: tuple[str, ...],
    routers: tuple[str, ...],
    typed: bool | None,
) -> ir.Model:
    count = draw(st.integers(1, experts))
    block = Block(
        experts=count,
        top_k=draw(st.integers(1, count)),
        hidden=draw(st.integers(1, size)),
        intermediate=draw(st.integers(1, size)),
        dtype=draw(st.sampled_from(dtypes)),
        router=draw(st.sampled_from(routers)),
        packed=draw(st.booleans()),
        transposed=draw(st.booleans()),
        gemm=draw(st.booleans()),
        spelling=draw(spellings(selections)),
    )
    depth = draw(st.integers(1, layers))
    opset = draw(st.sampled_from([opset for opset in OPSETS if opset >= 13]))
    scope = Scope(opset, operands=draw(st.sampled_from(OPERANDS)))
    scope.inputs["x"] = floats("x", block.dtype, ["T", block.hidden])

    def body(inner: Scope, x: str) -> str:
        for layer in range(depth):
            x = write_block(inner, x, block, f"layers.{layer}." if depth > 1 else "")
        return x

    placement = draw(st.sampled_from(placements))
    output = place(body, placement, block.dtype, captures=draw(st.booleans()))(scope, "x")
    return finish(
        scope,
        output,
        block.dtype,
        [*outer_shape(placement), "T", block.hidden],
        typed=_typed(draw, typed),
        named=draw(st.booleans()),
    )


@st.composite
def projections(
    draw: st.DrawFn,
    size: int,
    dtypes: tuple[str, ...],
    placements: tuple[str, ...],
    consumers: tuple[str, ...],
    hindrances: tuple[str, ...],
    typed: bool | None,
) -> ir.Model:
    dtype = draw(st.sampled_from(dtypes))
    k, n = draw(st.integers(1, size)), draw(st.integers(1, size))
    hindrance = draw(st.sampled_from(("", *hindrances)))
    transposed = draw(st.booleans())
    shape: tuple[int, ...] = (n, k) if transposed else (k, n)
    rank = 2 if hindrance == "several-matrices" else draw(st.sampled_from((2, 2, 3)))
    scope = Scope(draw(st.sampled_from(OPSETS)), inline=hindrance == "constant-node")
    scope.inputs["x"] = floats("x", dtype, ["T", k])

    def body(inner: Scope, x: str) -> str:
        total = ""
        for number in range(draw(st.integers(1, 3))):
            consumer = draw(st.sampled_from(consumers))
            deep = rank == 3 and consumer.startswith("matmul")
            name = f"W{draw(st.integers(0, number))}{'_deep' if deep else ''}"
            inner.weight(name, (1, *shape) if deep else shape, dtype)
            matrix = Matrix(name, 3 if deep else 2, (name,))
            product = consume(draw, inner, x, matrix, (k, n), dtype, draw(spellings()), consumer, transposed=transposed)
            total = inner.op("Add", total, product) if total else product
        if hindrance == "several-matrices":
            both = inner.op("MatMul", x, inner.weight("both", (2, k, n), dtype))
            total = inner.op("Add", total, inner.op("ReduceMax", both, keepdims=0))
        if hindrance == "weight-also-read":
            total = inner.op("Add", total, inner.op("ReduceMax", matrix.name, keepdims=0))
        return total

    placement = draw(st.sampled_from(placements))
    output = place(body, placement, dtype, captures=draw(st.booleans()))(scope, "x")
    weights = [name for name in scope.initializers if name.startswith("W")]
    if hindrance == "weight-is-output" and weights:
        scope.expose(weights[0], dtype)
    return finish(
        scope,
        output,
        dtype,
        [*outer_shape(placement), "T", n],
        overridable=tuple(weights[:1]) if hindrance == "weight-is-input" else (),
        typed=_typed(draw, typed),
        named=draw(st.booleans()),
    )


def _typed(draw: st.DrawFn, typed: bool | None) -> bool:
    return draw(st.sampled_from((True, True, True, False))) if typed is None else typed

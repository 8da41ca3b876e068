"""Strategies that draw small readable Mixture-of-Experts graphs, for properties of rules.

Each draws an ``onnx_ir.Model`` of a few nodes, whose input is ``x`` [T, K], and shrinks towards the plainest one: one
expert, one Gather, one MatMul, in the main graph.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import onnx_ir as ir
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from onnx import TensorProto, helper

from rewriter.errors import nearest
from rewriter.testing._blocks import ROUTERS, Block, write_block
from rewriter.testing._consumers import CONSUMERS, consume
from rewriter.testing._graph import FLOAT_TYPES, OPERANDS, Scope, floats
from rewriter.testing._placements import PLACEMENTS, finish, outer_shape, place
from rewriter.testing._spellings import SELECTIONS, Matrix, Stack, select, spellings

DTYPES = tuple(FLOAT_TYPES)
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
def _unrolled(
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
    return finish(scope, output, dtype, shape, overridable=overridable, typed=_typed(draw, typed), named=naming != "unnamed")


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


def unrolled_experts(
    *,
    max_experts: int = 5,
    max_size: int = 40,
    dtypes: Collection[str] = DTYPES,
    placements: Collection[str] = PLACEMENTS,
    selections: Collection[str] = SELECTIONS,
    consumers: Collection[str] = CONSUMERS,
    obstacles: Collection[str] = OBSTACLES,
    names: Collection[str] = NAMES,
    typed: bool | None = None,
    repeats: bool = True,
) -> st.SearchStrategy[ir.Model]:
    """Draws sums of products of ``x`` [T, K] with experts that are taken from one constant stack ``W``.

    Args:
        max_experts: largest number of experts in the stack, and of products.
        max_size: largest K and N.
        dtypes: element types, of ``DTYPES``.
        placements: where the experts stand, of ``PLACEMENTS``.
        selections: how a matrix is taken from the stack, of ``SELECTIONS``.
        consumers: what multiplies, of ``CONSUMERS``.
        obstacles: what may stand in the way, of ``OBSTACLES``; at most one in a model, and often none.
        names: how nodes and values are named, of ``NAMES``.
        typed: whether values carry types and shapes; None draws that too.
        repeats: whether an expert may be taken more than once, in different spellings.

    Raises:
        InvalidArgument: a name is unknown or a number is not positive.
    """
    _positive(max_experts=max_experts, max_size=max_size)
    return _unrolled(
        max_experts,
        max_size,
        _known("dtypes", dtypes, DTYPES),
        _known("placements", placements, PLACEMENTS),
        _known("selections", selections, SELECTIONS),
        _known("consumers", consumers, CONSUMERS),
        _known("obstacles", obstacles, OBSTACLES, empty=True),
        _known("names", names, NAMES),
        typed,
        repeats,
    )


def moe_models(
    *,
    max_experts: int = 5,
    max_size: int = 20,
    max_layers: int = 2,
    dtypes: Collection[str] = DTYPES,
    placements: Collection[str] = PLACEMENTS,
    selections: Collection[str] = SELECTIONS,
    routers: Collection[str] = ROUTERS,
    typed: bool | None = None,
) -> st.SearchStrategy[ir.Model]:
    """Draws whole layers: a router, every expert unrolled from constant stacks in one spelling, and their sum.

    Args:
        max_experts: largest number of experts.
        max_size: largest hidden and intermediate size.
        max_layers: largest number of layers, one after the other.
        dtypes: element types, of ``DTYPES``.
        placements: where the layers stand, of ``PLACEMENTS``.
        selections: how a matrix is taken from its stack, of ``SELECTIONS``.
        routers: how experts are chosen, of ``ROUTERS``.
        typed: whether values carry types and shapes; None draws that too.

    Raises:
        InvalidArgument: a name is unknown or a number is not positive.
    """
    _positive(max_experts=max_experts, max_size=max_size, max_layers=max_layers)
    return _moe(
        max_experts,
        max_size,
        max_layers,
        _known("dtypes", dtypes, DTYPES),
        _known("placements", placements, PLACEMENTS),
        _known("selections", selections, SELECTIONS),
        _known("routers", routers, ROUTERS),
        typed,
    )


@st.composite
def _moe(
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


def projections(
    *,
    max_size: int = 70,
    dtypes: Collection[str] = DTYPES,
    placements: Collection[str] = PLACEMENTS,
    consumers: Collection[str] = CONSUMERS,
    hindrances: Collection[str] = HINDRANCES,
    typed: bool | None = None,
) -> st.SearchStrategy[ir.Model]:
    """Draws sums of one to three linear maps of ``x`` [T, K], each with a constant weight.

    Args:
        max_size: largest K and N.
        dtypes: element types, of ``DTYPES``.
        placements: where the maps stand, of ``PLACEMENTS``.
        consumers: what multiplies, of ``CONSUMERS``.
        hindrances: what may stand in the way, of ``HINDRANCES``; at most one in a model, and often none.
        typed: whether values carry types and shapes; None draws that too.

    Raises:
        InvalidArgument: a name is unknown or a number is not positive.
    """
    _positive(max_size=max_size)
    return _projections(
        max_size,
        _known("dtypes", dtypes, DTYPES),
        _known("placements", placements, PLACEMENTS),
        _known("consumers", consumers, CONSUMERS),
        _known("hindrances", hindrances, HINDRANCES, empty=True),
        typed,
    )


@st.composite
def _projections(
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
            product = consume(
                draw, inner, x, matrix, (k, n), dtype, draw(spellings()), consumer, transposed=transposed
            )
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


def _known(what: str, given: Collection[str], known: Collection[str], *, empty: bool = False) -> tuple[str, ...]:
    if isinstance(given, str) or not (given or empty):
        raise InvalidArgument(f"{what} must be a collection of names, not {given!r}")
    for name in given:
        if name not in known:
            raise InvalidArgument(f"unknown name '{name}' in {what}{nearest(name, known)}")
    return tuple(name for name in known if name in given)


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise InvalidArgument(f"{name} must be a positive integer, not {number!r}")

"""Numbers of LANES blocks side by side: a type for compiled kernels that is one vector register, or several.

What a block of 32 weights needs for itself - sums across a register, a division, a search for the least - costs more
than its weights. With lane n for block n, all of it is done for LANES blocks at a time, and no lane sees another.
A compiler makes such code of loops at times; this says so. Operations keep their order and are rounded one by one, as
written, so that every processor computes the same bytes.

The functions are for compiled code alone, which also adds, subtracts, multiplies and divides lanes by the signs for it.

The cache of compiled kernels does not see a change in this file: save ``kernels.py`` anew after one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core.typing import templates
from numba.extending import lower_builtin, models, register_model

LANES = 32 if llvm.get_host_cpu_features().get("avx512f") else 16
"""Two registers of AVX-512, one working while the other waits; two of AVX2, of which there are half as many."""

Lanes: TypeAlias = Any
"""LANES float32 numbers."""

Tile: TypeAlias = npt.NDArray[np.float32]
"""[N, LANES], C-contiguous: weight i of every block in row i; or some figure of every block."""

TURNED = 4
"""Rows and columns of what is transposed in registers."""

FLOATS, INTEGERS, MASK = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES), ir.IntType(LANES)
Build: TypeAlias = Callable[..., Any]
"""Writes the instructions of an operation; is given the builder and the operands."""


class LanesType(numba.types.Type):
    """The type of lanes."""

    def __init__(self) -> None:
        super().__init__(name=f"lanes{LANES}")


class LanesModel(models.PrimitiveModel):
    """How compiled code holds lanes."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)  # type: ignore[no-untyped-call]  # numba's


NUMBA: Any = templates
"""As which numba's functions without types may be called."""

register_model(LanesType)(LanesModel)
LANE: Any = cast("Any", LanesType)()
TILE, READ = (numba.types.Array(numba.float32, 2, "C", readonly=only) for only in (False, True))
INDEX, FLOAT = numba.intp, numba.float32


def fill(value: np.float32) -> Lanes:
    """Returns lanes that all hold the value."""


def load(tile: Tile, row: int) -> Lanes:
    """Returns a row of a tile."""


def store(tile: Tile, row: int, value: Lanes) -> None:
    """Writes a row of a tile."""


def turn(source: Tile, row: int, column: int, target: Tile, to_row: int, to_column: int) -> None:
    """Writes TURNED rows and columns of the source, from those given on, transposed to the target."""


def four_bytes(a: Lanes, b: Lanes, c: Lanes, d: Lanes) -> Lanes:
    """Returns lanes that hold four integers in 0..255 as bytes, the first one first; only to be stored."""


def rint(value: Lanes) -> Lanes:
    """Rounds to integers, ties to even."""


def sqrt(value: Lanes) -> Lanes:
    """Returns square roots."""


def fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Returns a * b + c, rounded once."""


def if_less(a: Lanes, b: Lanes, yes: Lanes, no: Lanes) -> Lanes:
    """Returns ``yes`` where a < b, and ``no`` elsewhere, where either is NaN too."""


def minimum(a: Lanes, b: Lanes) -> Lanes:
    """Returns the smaller; b where either is NaN."""


def maximum(a: Lanes, b: Lanes) -> Lanes:
    """Returns the larger; b where either is NaN."""


def any_less(a: Lanes, b: Lanes) -> Any:
    """Tells whether a < b in any lane, a bool."""


def exponents_of(value: Lanes) -> Lanes:
    """Returns e with ``value * 2^-e`` in [0.5, 1), of positive normal numbers."""


def powers_of_two(exponent: Lanes) -> Lanes:
    """Returns 2^exponent of integers in -126..127."""


def _operation(function: Any, result: Any, *kinds: Any) -> Callable[[Build], None]:
    """Teaches compiled code a function, or the sign for one."""

    def decorate(build: Build) -> None:
        known = {"cases": [NUMBA.signature(result, *kinds)]}
        NUMBA.infer_global(function)(type(f"{function.__name__}Template", (NUMBA.ConcreteTemplate,), known))

        def lower(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            found = [
                context.make_array(kind)(context, builder, operand) if kind in (TILE, READ) else operand
                for kind, operand in zip(kinds, operands, strict=True)
            ]
            return build(builder, *found)

        cast("Any", lower_builtin)(function, *kinds)(lower)

    return decorate


def _call(builder: Any, name: str, *operands: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * len(operands))
    return builder.call(builder.module.declare_intrinsic(f"llvm.{name}.v{LANES}f32", (), kind), operands)


def _whole(value: int) -> Any:
    return ir.Constant(INTEGERS, [value] * LANES)


for _sign, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operation(_sign, LANE, LANE, LANE)(lambda builder, a, b, name=_name: getattr(builder, name)(a, b))
for _function, _count in ((rint, 1), (sqrt, 1), (fma, 3)):
    _operation(_function, LANE, *[LANE] * _count)(
        lambda builder, *operands, name=_function.__name__: _call(builder, name, *operands)
    )


@_operation(fill, LANE, FLOAT)
def _(builder: Any, value: Any) -> Any:
    unknown = ir.Constant(FLOATS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(unknown, value, ir.IntType(32)(0)), unknown, _whole(0))


def _read(builder: Any, data: Any, place: Any, kind: Any = FLOATS) -> Any:
    value = builder.load(builder.bitcast(builder.gep(data, [place]), kind.as_pointer()))
    value.align = 4
    return value


def _write(builder: Any, value: Any, data: Any, place: Any) -> Any:
    builder.store(value, builder.bitcast(builder.gep(data, [place]), value.type.as_pointer())).align = 4
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(load, LANE, TILE, INDEX)
def _(builder: Any, tile: Any, row: Any) -> Any:
    return _read(builder, tile.data, builder.mul(row, ir.Constant(row.type, LANES)))


@_operation(store, numba.types.none, TILE, INDEX, LANE)
def _(builder: Any, tile: Any, row: Any, value: Any) -> Any:
    return _write(builder, value, tile.data, builder.mul(row, ir.Constant(row.type, LANES)))


@_operation(turn, numba.types.none, READ, INDEX, INDEX, TILE, INDEX, INDEX)
def _(builder: Any, source: Any, row: Any, column: Any, target: Any, to_row: Any, to_column: Any) -> Any:
    def places(tile: Any, first: Any, second: Any) -> list[Any]:
        width = builder.extract_value(tile.shape, 1)
        rows = [builder.add(first, ir.Constant(first.type, n)) for n in range(TURNED)]
        return [builder.add(builder.mul(n, width), second) for n in rows]

    def mixed(a: Any, b: Any, *lanes: int) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), TURNED), lanes))

    quarter = ir.VectorType(ir.FloatType(), TURNED)
    a, b, c, d = (_read(builder, source.data, place, quarter) for place in places(source, row, column))
    low, high = ((mixed(*pair, 0, 4, 1, 5), mixed(*pair, 2, 6, 3, 7)) for pair in ((a, b), (c, d)))
    turned = [mixed(*pair, *lanes) for pair in zip(low, high, strict=True) for lanes in ((0, 1, 4, 5), (2, 3, 6, 7))]
    for value, place in zip(turned, places(target, to_row, to_column), strict=True):
        nothing = _write(builder, value, target.data, place)
    return nothing


@_operation(four_bytes, LANE, LANE, LANE, LANE, LANE)
def _(builder: Any, *values: Any) -> Any:
    whole = [builder.fptosi(value, INTEGERS) for value in values]
    parts = [builder.shl(value, _whole(8 * n)) for n, value in enumerate(whole)]
    return builder.bitcast(functools.reduce(builder.or_, parts), FLOATS)


@_operation(if_less, LANE, LANE, LANE, LANE, LANE)
def _(builder: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), yes, no)


@_operation(minimum, LANE, LANE, LANE)
def _(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@_operation(maximum, LANE, LANE, LANE)
def _(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_operation(any_less, numba.types.boolean, LANE, LANE)
def _(builder: Any, a: Any, b: Any) -> Any:
    return builder.icmp_unsigned("!=", builder.bitcast(builder.fcmp_ordered("<", a, b), MASK), MASK(0))


@_operation(exponents_of, LANE, LANE)
def _(builder: Any, value: Any) -> Any:
    biased = builder.lshr(builder.bitcast(value, INTEGERS), _whole(23))
    return builder.sitofp(builder.sub(biased, _whole(126)), FLOATS)


@_operation(powers_of_two, LANE, LANE)
def _(builder: Any, value: Any) -> Any:
    biased = builder.add(builder.fptosi(value, INTEGERS), _whole(127))
    return builder.bitcast(builder.shl(biased, _whole(23)), FLOATS)

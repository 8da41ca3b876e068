"""Einsum of an input and a constant weight -> MatMul, which other rules quantize.

Matched:      Einsum(x, w) or Einsum(w, x), w constant: 'th,hi->ti', 'bth,nhd->btnd', 'btnd,ndh->bth', 'eti,ehi->eth'
Replacement:  MatMul(x, w) on a lazy view of w, [K, N] or, where an index is in all three terms, a stack [E, K, N];
              with a Transpose or Reshape of x and of the product where their indices lie otherwise
Declines when:
              the plan keeps the weight in float: there is no other reason to write the product anew
              the equation has no result, is no product of two matrices, or would take a stack with a batch of rows
              an extent that x shares with w is unknown, or another: an extent of 1 is repeated
              something else reads the weight, which would stay beside its view; a cast has widened it
Source:       torch.einsum, which torch.onnx writes as it stands
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from rewriter.emit import require_matmul_nbits, typed, write_integers
from rewriter.facts import Facts, Transfer
from rewriter.facts.shapes import fed_shape, shape_of
from rewriter.facts.size import Dims
from rewriter.graph.attributes import text_attribute
from rewriter.graph.declines import INFER_SHAPES
from rewriter.rule import Declined, Fed, NotApplicable, Replacement, Rule
from rewriter.rules.blocks import experts
from rewriter.rules.blocks.guards import FLOATS
from rewriter.rules.blocks.readers import require_one_reader
from rewriter.tensors import View, ViewTensor


@dataclass(frozen=True)
class Product:
    """An equation that is one product of matrices, or one for each index of a stack; a letter for each dimension.

    Attributes:
        x: the letters of x.
        w: of the weight.
        out: of the result.
        batch: the letter that all three have, or nothing.
        rows: the letters of x and the result.
        inner: of x and w, over which is summed; in the order of x.
        columns: of w and the result, in the order of the result.
    """

    x: str
    w: str
    out: str
    batch: str
    rows: str
    inner: str
    columns: str


class EinsumToMatMul(Rule):
    """The rule at an Einsum."""

    recognisers: ClassVar[Iterable[Transfer]] = experts.RECOGNISERS  # those of sizes among them

    def __init__(self) -> None:
        super().__init__(name="einsum-to-matmul")

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return op.Einsum(a, b, _outputs=["y"])

    def rewrite(self, op: Any, *, a: ir.Value, b: ir.Value, y: ir.Value) -> Replacement:
        node = y.producer()
        assert node is not None
        facts = self.run.facts
        stored = {value: view for value in (a, b) if (view := facts.get(value, View)) is not None}
        if len(stored) != 1:
            raise NotApplicable
        ((w, view),) = stored.items()
        if view.rank < 2 or view.dtype not in FLOATS or 0 in view.shape:
            raise NotApplicable
        given = x = b if w is a else a
        product, sizes, dims = read(facts, node, x, view, swapped=w is a)
        require_one_reader(facts, w, node)
        if view.dtype != view.source.dtype:
            raise Declined(
                f"the weight is stored as {view.source.dtype.name}, and a {view.dtype.name} view is larger", w
            )
        weight = _weight(product, view, sizes)
        for matrix in [weight] if not product.batch else [weight.index(0, e) for e in range(weight.shape[0])]:
            require_matmul_nbits(self.run, self.run.quantize(matrix.T, node), w)
        lead = product.batch + product.rows
        x = _arranged(op, x, product.x, lead + product.inner)
        if len(product.inner) > 1:
            x = _reshaped(op, x, len(lead), [weight.shape[-2]])
        if x is not given:
            typed(x, view.dtype, [*(sizes.get(letter) for letter in lead), weight.shape[-2]])
        out = op.MatMul(x, op.initializer(ViewTensor(weight)))
        if len(product.columns) > 1:
            out = _reshaped(op, out, len(lead), [sizes[letter] for letter in product.columns])
        out = _arranged(op, out, lead + product.columns, product.out)
        return Replacement({y: out}, [node], {given: Fed(view.dtype, fed_shape(dims))})


def read(
    facts: Facts, node: ir.Node, x: ir.Value, w: View, *, swapped: bool
) -> tuple[Product, Mapping[str, int], Dims]:
    """Returns the product that an Einsum is, the extents of the weight's letters and those of x, or declines."""
    equation = text_attribute(node, "equation", "")
    dims = shape_of(facts, x)
    if dims is None:
        raise Declined("the rank of its input is unknown", x, remedy=INFER_SHAPES)
    product = _product(equation, len(dims), swapped=swapped)
    if product is None or (len(product.x), len(product.w)) != (len(dims), w.rank):
        raise Declined(f"Einsum '{equation}' is no product of matrices with the weight", node)
    if product.batch and len(product.rows) > 1:
        raise Declined(f"Einsum '{equation}' takes several dimensions of rows for each matrix of a stack", node)
    sizes = dict(zip(product.w, w.shape, strict=True))
    for letter, size in zip(product.x, dims, strict=True):
        if letter in sizes and size.constant != sizes[letter]:
            found = "unknown" if size.constant is None else size.constant
            raise Declined(f"'{letter}' of '{equation}' is {found} in its input and {sizes[letter]} in the weight", x)
    return product, sizes, dims


def _product(equation: str, rank: int, *, swapped: bool) -> Product | None:
    """The product of x, of some rank, and a weight that an equation says, or None; dots become letters."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    if not arrow or len(terms) != 2:
        return None
    x, w = terms[::-1] if swapped else terms
    if "..." in x and "..." in out and "." not in w:
        unused = [letter for letter in string.ascii_letters if letter not in equation]
        dots = "".join(unused[: max(0, rank - len(x) + 3)])
        x, out = x.replace("...", dots), out.replace("...", dots)
    if any(len(set(term)) != len(term) or not term.isalpha() for term in (x, w, out)):
        return None
    batch, rows = _those(x, w, out), _those(x, out, without=w)
    inner, columns = _those(x, w, without=out), _those(out, w, without=x)
    whole = set(x) == {*batch, *rows, *inner} and set(w) == {*batch, *inner, *columns} and set(out) <= {*x, *w}
    if not (whole and rows and inner and columns) or len(batch) > 1:
        return None
    return Product(x, w, out, batch, rows, inner, columns)


def _those(term: str, *others: str, without: str = "") -> str:
    """The letters of a term that others have too."""
    return "".join(letter for letter in term if all(letter in o for o in others) and letter not in without)


def _weight(product: Product, view: View, sizes: Mapping[str, int]) -> View:
    """The weight as [K, N], or [E, K, N]."""
    turned = view.transpose([product.w.index(letter) for letter in product.batch + product.inner + product.columns])
    groups = [group for group in (product.batch, product.inner, product.columns) if group]
    return turned.reshape([math.prod(sizes[letter] for letter in group) for group in groups])


def _arranged(op: Any, value: ir.Value, letters: str, wanted: str) -> ir.Value:
    """The value with its dimensions in the order that is wanted."""
    if letters == wanted:
        return value
    turned: ir.Value = op.Transpose(value, perm=[letters.index(letter) for letter in wanted])
    return turned


def _reshaped(op: Any, value: ir.Value, kept: int, last: Sequence[int]) -> ir.Value:
    """The value with its first dimensions as they are, and these behind them."""
    reshaped: ir.Value = op.Reshape(value, write_integers(op, [0] * kept + [*last], "shape"))
    return reshaped


def rule() -> Rule:
    """Builds the rule."""
    return EinsumToMatMul()

"""A product with a constant stack of matrices, all at once -> one MatMul for each matrix.

Matched:      MatMul(x, w), w [E, K, N] constant, x [E, T, K] or, the same for all, [1, T, K] or [T, K]
Replacement:  Concat(MatMul(x[0], w[0]), MatMul(x[1], w[1]), ..), every matrix a lazy slice of the stack
Declines when:
              the plan keeps the matrices in float: there is no other reason to take them apart
              the rank of x is unknown or above 3, or its first extent is not known to be E or 1
              something else reads the stack, which would stay beside its slices
Source:       experts that are all computed, as Llama 4 and gpt-oss do outside of training: torch.bmm
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.emit import require_matmul_nbits, typed, write_integers
from rewriter.facts import Facts
from rewriter.facts.shapes import fed_shape, shape_of
from rewriter.facts.size import Dims, Size
from rewriter.rule import Declined, Fed, NotApplicable, Replacement, Rule
from rewriter.rules.blocks.guards import FLOATS
from rewriter.rules.blocks.readers import require_one_reader
from rewriter.tensors import View, ViewTensor


class Unbatch(Rule):
    """The rule at a MatMul."""

    def __init__(self) -> None:
        super().__init__(name="unbatch")

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMul(x, w, _outputs=["y"])

    def rewrite(self, op: Any, *, x: ir.Value, w: ir.Value, y: ir.Value) -> Replacement:
        node = y.producer()
        assert node is not None
        stack = require_stack(self.run.facts, w)
        sizes = _sizes(self.run.facts, x, stack.shape[1])
        batch = 1 if len(sizes) == 2 else sizes[0].constant
        if batch not in (1, stack.shape[0]):
            raise Declined(f"the first extent of its input is {batch or 'unknown'}, not {stack.shape[0]}", x)
        require_one_reader(self.run.facts, w, node)
        matrices = [stack.index(0, e) for e in range(stack.shape[0])]
        for matrix in matrices:
            job = self.run.quantize(matrix.T, node)
            require_matmul_nbits(self.run, job, w)
        rows, k = x, stack.shape[1]
        row_shape = (1, None, k)
        if len(sizes) == 2:
            rows = typed(op.Reshape(x, write_integers(op, [1, -1, k], "one_batch")), stack.dtype, row_shape)
        parts = []
        for e, matrix in enumerate(matrices):
            own = rows
            if batch != 1:
                own = typed(op.Gather(rows, write_integers(op, [e], "expert"), axis=0), stack.dtype, row_shape)
            parts.append(op.MatMul(own, op.initializer(ViewTensor(matrix))))
        return Replacement({y: op.Concat(*parts, axis=0)}, [node], {x: Fed(stack.dtype, fed_shape(sizes))})


def require_stack(facts: Facts, w: ir.Value) -> View:
    """Returns the stack [E, K, N] of several matrices that ``w`` is; to nothing else the rule applies."""
    view = facts.get(w, View)
    if view is None or view.rank != 3 or view.shape[0] < 2 or view.dtype not in FLOATS or 0 in view.shape:
        raise NotApplicable
    return view


def _sizes(facts: Facts, x: ir.Value, k: int) -> Dims:
    """The extents of ``x`` [.., K], of which there are two or three."""
    dims = shape_of(facts, x)
    if dims is None or len(dims) not in (2, 3):
        raise Declined(f"the rank of its input is {'unknown' if dims is None else len(dims)}, not 2 or 3", x)
    return (*dims[:-1], Size(k))


def rule() -> Rule:
    """Builds the rule."""
    return Unbatch()

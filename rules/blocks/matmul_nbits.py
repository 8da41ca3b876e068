"""What the rules to MatMulNBits share: reading a constant [N, K] weight, and what a Gemm adds to its product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import onnx_ir as ir

from rewriter.emit import matmul_nbits_refusal, require_matmul_nbits, scale_type
from rewriter.graph.attributes import float_attribute, integer_attribute
from rewriter.graph.declines import (
    INFER_SHAPES,
    ON_THE_RIGHT,
    ONE_FLOAT_TYPE,
    ONE_MATRIX,
    ONE_READER,
    PLAIN_MATMUL,
    UNSTACK,
    Reason,
    stays_float,
)
from rewriter.operators.layout.stored import Stored
from rewriter.quantize import born, lossless
from rewriter.quantize.born import Kept
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.types import QuantizedShape, WeightSpec
from rewriter.rule import Declined, NotApplicable, Run
from rewriter.rules.blocks.guards import FLOATS, require_constant, require_float
from rewriter.rules.blocks.readers import Use, is_whole, origin, readers, require_one_reader
from rewriter.tensors import View

Held = TypeVar("Held")

_FEW = 2
"""Rows or columns of a weight whose blocks are mostly filling."""


def read_linear(run: Run, x: ir.Value, w: ir.Value, reader: ir.Node, *, transposed: bool) -> QuantizationJob:
    """Returns the [N, K] weight of ``x @ w`` (``x @ w.T`` where ``transposed``), to be quantized, or declines.

    Args:
        run: the present run.
        x: [.., K] activations.
        w: [K, N], [1, .., K, N], or [N, K] where ``transposed``.
        reader: the node that multiplies.
        transposed: whether ``w`` is stored [N, K].
    """
    matrix = read_weight(run, x, w)
    _require_float_copy_disappears(run, w, reader)
    (job,) = in_blocks(
        [run.quantize(matrix if transposed else matrix.T, reader)],
        lambda shape: matmul_nbits_refusal(run, shape, matrix.dtype),
    )
    ((job,),) = on_their_grid(
        run,
        [job.weight],
        [[job]],
        lambda spec: None if matmul_nbits_refusal(run, job.shape_in(spec), matrix.dtype) else spec,
        w,
    ).jobs
    _require_smaller(job, require_matmul_nbits(run, job, w), w)
    return job


def in_blocks(
    jobs: Sequence[QuantizationJob], refuse: Callable[[QuantizedShape], str | None]
) -> tuple[QuantizationJob, ...]:
    """Gives weights [N, K] that are to have one scale a row, which their operator has not, the longest blocks it takes.

    Args:
        jobs: of one spec and shape.
        refuse: why the operator or the target cannot hold a weight so, or None.

    Returns:
        The jobs; as they were where the plan asks for blocks, or no blocks help.
    """
    spec, k = jobs[0].context.spec, jobs[0].shape[1]
    because = None if spec.block_size else refuse(jobs[0].stored_shape)
    if because is None:
        return tuple(jobs)
    for block in born.BLOCKS[1:]:
        own = replace(spec, block_size=block)
        if block < 2 * k and refuse(jobs[0].shape_in(own)) is None:
            contexts = (replace(job.context, spec=own, planned=spec, because=because) for job in jobs)
            return tuple(replace(job, context=context) for job, context in zip(jobs, contexts, strict=True))
    return tuple(jobs)


def _require_smaller(job: QuantizationJob, stored: Stored, culprit: ir.Value) -> None:
    """Declines where a weight of one or two rows or columns would grow: its blocks are filled up, and have scales."""
    taken = sum(-(-math.prod(part.shape) * part.dtype.bitwidth // 8) for part in stored.parts(scale_type(job)))
    held = job.weight.unwidened.nbytes
    if min(job.shape) <= _FEW and taken >= held:
        raise Declined(f"the weight takes {held} bytes, and would take {taken} quantized", culprit)


def on_their_grid(
    run: Run,
    views: Sequence[View],
    jobs: Sequence[Sequence[QuantizationJob]],
    hold: Callable[[WeightSpec], Held | None],
    culprit: ir.Node | ir.Value,
) -> Kept[Held]:
    """Returns what becomes of weights that one operator holds: see ``born.keep``; declines where no algorithm is left.

    Args:
        run: the present run.
        views: weights [N, K] or stacks [E, N, K].
        jobs: of each of these, one for each matrix.
        hold: how the operator holds them on a grid; None where it cannot, or the target does not run it.
        culprit: what a decline is about.
    """
    kept = born.keep(views, jobs, hold, run.looks, whole=run.looks_whole)
    if kept.held is None and any(own[0].context.spec.algorithm == lossless.NAME for own in jobs):
        why = f": {kept.off}" if kept.off else ""
        raise Declined(f"the weights lie on no grid that a kernel of the target runs{why}", culprit)
    return kept


def read_weight(run: Run, x: ir.Value, w: ir.Value) -> View:
    """Returns the one constant matrix that ``w`` is, as it is stored, or declines; see ``read_linear``."""
    facts = run.facts
    if facts.get(x, View) is not None and facts.get(w, View) is None:
        raise Declined("the weight is on the left; MatMulNBits takes it on the right", x, remedy=ON_THE_RIGHT)
    if facts.get(w, View) is None and not facts.why_not(w):
        raise NotApplicable
    view = require_constant(facts, w, "the weight")
    if view.rank < 2 or not view.dtype.is_floating_point():
        raise NotApplicable
    if any(d != 1 for d in view.shape[:-2]):
        raise Declined(
            f"the weight {list(view.shape)} holds {view.size} elements in more than one matrix", w, remedy=ONE_MATRIX
        )
    if view.rank > 2 and (x.shape is None or x.shape.rank() < view.rank):
        raise Declined(
            f"the weight has rank {view.rank} and the rank of its input is lower or unknown", x, remedy=INFER_SHAPES
        )
    known = x.dtype is not None or view.dtype not in FLOATS  # else it is the weight's: a product's operands have one
    dtype = require_float(x) if known else view.dtype
    if dtype != view.dtype:
        raise Declined(f"the weight is {view.dtype.name} and its input {dtype.name}", w, remedy=ONE_FLOAT_TYPE)
    if 0 in view.shape:
        raise Declined(f"the weight {list(view.shape)} is empty", w)
    return view.reshape(view.shape[-2:])


def addend(node: ir.Node) -> ir.Value | None:
    """Returns what a Gemm adds to ``x @ w``, or declines: it computes something else."""
    if integer_attribute(node, "transA", 0):
        raise Declined("transA is set; MatMulNBits reads x as it is", node, remedy=PLAIN_MATMUL)
    if (alpha := float_attribute(node, "alpha", 1.0)) != 1.0:
        raise Declined(f"alpha is {alpha}; MatMulNBits has no such factor", node, remedy=PLAIN_MATMUL)
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is not None and (beta := float_attribute(node, "beta", 1.0)) != 1.0:
        raise Declined(f"beta is {beta}; MatMulNBits adds its bias as it is", node, remedy=PLAIN_MATMUL)
    return c


def takes_bias(run: Run, n: int, c: ir.Value) -> bool:
    """Whether MatMulNBits adds ``c`` itself."""
    return c.shape is not None and c.shape.dims == (n,) and run.target.linear.takes_bias


@dataclass(frozen=True)
class _Keeping:
    """The readers of a stored weight that would keep it in float, and why: of thousands, each is looked at once."""

    uses: tuple[tuple[Use, Declined], ...]


def _require_float_copy_disappears(run: Run, w: ir.Value, reader: ir.Node) -> None:
    """Declines where quantizing would leave the float weight in the model beside the quantized one."""
    if not is_whole(run.facts, w):
        raise Declined(
            "the weight is part of a constant that stays in the model (rule unstack takes it out)",
            w.producer(),
            remedy=UNSTACK,
        )
    if w is not origin(run.facts, w):
        require_one_reader(run.facts, w, reader)
        return
    keeping = run.facts.derived(w, _Keeping, lambda: _keeping(run, w))
    if any(use.node.graph is None for use, _ in keeping.uses):  # a reader has gone since
        keeping = _keeping(run, w)
    for use, declined in keeping.uses:
        if use.node is not reader or use.idx != 1:
            raise declined
    if w.is_graph_output():
        raise stays_float(w)


def _keeping(run: Run, w: ir.Value) -> _Keeping:
    found = []
    for use in readers(run.facts, w):
        # Who reads a view may decline later for what a view hides, and the constant would stay.
        if use.node.op_type not in ("MatMul", "Gemm") or use.idx != 1 or use.node.inputs[1] is not w:
            found.append((use, stays_float(use.node)))
            continue
        try:
            _require_linear(run, use.node, w)
        except Declined as declined:
            found.append((use, declined))
    return _Keeping(tuple(found))


def _require_linear(run: Run, node: ir.Node, w: ir.Value) -> None:
    """Declines where a reader of ``w`` cannot become a MatMulNBits."""
    x = node.inputs[0]
    try:
        if x is not None:
            read_weight(run, x, w)
        if node.op_type == "Gemm":
            addend(node)
    except Declined as other:
        reason = Reason(
            f"the float weight would stay in the model: {node.op_type} also reads it, and {other.reason}", ONE_READER
        )
        raise Declined(reason, node) from other

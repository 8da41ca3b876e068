"""Gather of a float table, or of an expert's weight by a run-time index -> GatherBlockQuantized.

Matched:      Gather(w, ids), axis 0, or GatherND(w, ids [.., 1]); w constant, ids not:
              an embedding [V, K], by its role, or a stack of experts [E, N, K] or [E, K, N]
Replacement:  GatherBlockQuantized(data, ids, scales[, zero_points]); a stack whose reader contracts the second axis
              is stored transposed, so that blocks lie along the input features, and a Transpose follows the gather
Declines when:
              w has rank above 3, or is gathered along another axis or by tuples
              w takes fewer bytes than min_bytes
              the float weight would stay in the model beside the quantized one
              the plan keeps w in float, gives experts of one stack different specs, or the operator has no such form
Source:       com.microsoft::GatherBlockQuantized; experts in batches from torch.onnx and transformers, the builder's
              decomposed experts, traced eager loops
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.emit import write_integers
from rewriter.facts.integers import static
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import INFER_SHAPES, MIN_BYTES, ONE_FLOAT_TYPE, ONE_SPEC, Reason, reason_of, stays_float
from rewriter.operators.gather_block_quantized import TABLE
from rewriter.operators.layout.stored import Refusal, Stored
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.types import QuantizedShape
from rewriter.rule import Declined, NotApplicable, Rule, Run
from rewriter.rules.blocks.gather_block_quantized import gather, quantized_rows
from rewriter.rules.blocks.guards import FLOATS, require_constant
from rewriter.rules.blocks.matmul_nbits import in_blocks, on_their_grid
from rewriter.rules.blocks.readers import contracted_axis, readers, reads_rows
from rewriter.tensors import View


@dataclass(frozen=True)
class Rows:
    """A constant whose rows, or matrices, are picked at run time.

    Attributes:
        view: [V, K], [E, N, K] or, where there is a ``perm``, [E, K, N].
        jobs: one [V, K] weight, or E weights [N, K].
        stored: how each of them is stored.
        perm: of the Transpose that follows the lookup of a stack stored transposed, or None.
    """

    view: View
    jobs: tuple[QuantizationJob, ...]
    stored: Stored
    perm: tuple[int, ...] | None


class GatherToGatherBlockQuantized(Rule):
    """The rule at a Gather, at a GatherND, or at a GatherND whose index was given its last axis by an Unsqueeze."""

    def __init__(self, op_type: str, unsqueezed: bool, min_bytes: int) -> None:
        super().__init__(name="gather-to-gather-block-quantized", remove_nodes=False)
        self._op_type = op_type
        self._unsqueezed = unsqueezed
        self._min_bytes = min_bytes

    def pattern(self, op: Any, w: Any, ids: Any) -> Any:
        index = op.Unsqueeze(ids, _allow_other_inputs=True, _outputs=["index"]) if self._unsqueezed else ids
        return getattr(op, self._op_type)(w, index, _outputs=["y"])

    def rewrite(self, op: Any, *, w: ir.Value, ids: ir.Value, y: ir.Value, index: ir.Value | None = None) -> Any:
        node = y.producer()
        assert node is not None
        if self._op_type == "GatherND":
            _require_one_index(self.run, node, ids, index)
        rows = read(self.run, w, ids, node, self._min_bytes)
        spec = rows.jobs[0].context.spec
        tensors = quantized_rows(rows.jobs, rows.stored, rows.view.dtype, rows.view.name, stack=rows.view.rank == 3)
        data, *others = [op.initializer(tensor) for tensor in tensors]
        if self._op_type == "GatherND" and not self._unsqueezed:
            assert ids.shape is not None
            ids = op.Reshape(ids, write_integers(op, [0] * (ids.shape.rank() - 1), "without_last_axis"))
        gathered = gather(op, data, ids, others, bits=spec.bits, block=spec.block_size, axis=rows.view.rank - 1)
        return gathered if rows.perm is None else op.Transpose(gathered, perm=list(rows.perm))


def read(run: Run, w: ir.Value, ids: ir.Value, node: ir.Node, min_bytes: int) -> Rows:
    """Reads what ``node`` looks up in ``w``, or declines."""
    view = run.facts.get(w, View)
    if view is None and run.facts.why_not(w) and run.role(node).name == "embedding":
        require_constant(run.facts, w, "the table")
    if view is None or run.facts.get(ids, View) is not None:
        raise NotApplicable
    known = view.rank > 2 or (view.rank == 2 and run.role(node).name == "embedding")
    if not known or not view.dtype.is_floating_point():
        raise NotApplicable  # angles, masks, factors and biases lose too much; nothing says that it is a weight
    if view.dtype not in FLOATS:
        raise Declined(f"the table is {view.dtype.name}; only floats are quantized", w, remedy=ONE_FLOAT_TYPE)
    if view.rank > 3:
        raise Declined(f"the table has rank {view.rank}; rows of rank 2 and matrices of rank 3 are quantized", w)
    if node.op_type == "Gather" and integer_attribute(node, "axis", 0) % view.rank:
        raise Declined("it gathers along another axis than the first", node)
    if view.nbytes < min_bytes:
        raise Declined(f"the table takes {view.nbytes} bytes, fewer than min_bytes = {min_bytes}", w, remedy=MIN_BYTES)
    for use in readers(run.facts, w):
        if not reads_rows(use):
            raise stays_float(use.node)
    perm = None if view.rank == 2 else _perm(run, node, ids)
    matrices = [view] if view.rank == 2 else [view.index(0, e) for e in range(view.shape[0])]
    jobs = tuple(run.quantize(m if perm is None else m.T, node) for m in matrices)
    if len({job.context.spec for job in jobs}) > 1:
        raise Declined(
            "the plan gives the experts of one stack different specs; one operator holds one", node, remedy=ONE_SPEC
        )
    jobs = in_blocks(jobs, lambda shape: _refusal(run, jobs[0], shape))
    turned = view if perm is None else view.transpose((0, 2, 1))
    kept = on_their_grid(
        run, [turned], [jobs], lambda spec: None if _refusal(run, jobs[0], jobs[0].shape_in(spec)) else spec, w
    )
    (jobs,) = kept.jobs
    if reason := _refusal(run, jobs[0], jobs[0].stored_shape):
        raise Declined(reason, w, remedy=reason_of(reason).remedy)
    return Rows(view, jobs, TABLE.require(jobs[0].stored_shape), perm)


def _refusal(run: Run, job: QuantizationJob, shape: QuantizedShape) -> str | None:
    """Returns why the operator cannot hold a weight so, or the target cannot look it up, or None."""
    stored = TABLE.of(shape)
    if isinstance(stored, Refusal):
        return stored.reason
    reason = run.target.lookup.refusal(
        job.weight.dtype.name, shape.k, shape.bits, shape.block, symmetric=shape.symmetric
    )
    return Reason(f"GatherBlockQuantized on {run.target}: {reason}", reason_of(reason).remedy) if reason else None


def _perm(run: Run, node: ir.Node, ids: ir.Value) -> tuple[int, ...] | None:
    """Returns what puts matrices stored [N, K] back as the reader of ``node`` wants them, or None."""
    if ids.shape is None:
        raise Declined("the rank of the index is unknown", ids, remedy=INFER_SHAPES)
    rank = 2 + ids.shape.rank() - (node.op_type == "GatherND" and ids is node.inputs[1])
    if contracted_axis(run.facts, node.outputs[0], rank) == -1:
        return None
    return (*range(rank - 2), rank - 1, rank - 2)


def _require_one_index(run: Run, node: ir.Node, ids: ir.Value, index: ir.Value | None) -> None:
    """Declines where a GatherND does not index the first axis alone."""
    if run.facts.get(node.inputs[0], View) is None:
        raise NotApplicable
    if integer_attribute(node, "batch_dims", 0):
        raise Declined("it gathers in batches", node)
    value = ids if index is None else index
    appended = _appended_axis(run, value)
    if appended != (index is not None):
        raise NotApplicable  # the other of the two spellings is asked too
    if not appended and not (value.shape is not None and value.shape.rank() and value.shape[-1] == 1):
        raise Declined("its index is not known to be of one axis", value)


def _appended_axis(run: Run, index: ir.Value) -> bool:
    """Whether an Unsqueeze gave ``index`` its last axis."""
    node = index.producer()
    if node is None or node.op_type != "Unsqueeze" or node.inputs[0] is None:
        return False
    axes = static(run.facts, node, 1, "axes")
    shape = node.inputs[0].shape
    return axes is not None and len(axes) == 1 and axes[0] in (-1, None if shape is None else shape.rank())


def rule(*, min_bytes: int = 4096) -> list[Rule]:
    """Builds the rule, at each operator that looks rows up.

    Args:
        min_bytes: smaller tables stay float.
    """
    spellings = (("Gather", False), ("GatherND", True), ("GatherND", False))
    return [GatherToGatherBlockQuantized(op_type, unsqueezed, min_bytes) for op_type, unsqueezed in spellings]

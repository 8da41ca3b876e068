"""An embedding and an output projection that are one weight -> one quantized table that both read.

Matched:      Gather(w, ids) and MatMul(x, w.T), or Gemm; w constant [V, H] in any spelling, or two constants that
              are equal (compared, byte by byte)
Replacement:  MatMulNBits(x, B, scales[, zero_points]) and, by the option ``form``,
              blocks: Reshape(GatherBlockQuantized(B [V, H/block, ..], ids, scales [V, H/block, 1]), [.., H]);
              flat: GatherBlockQuantized(Reshape(B, [V, ..]), ids, scales)
Declines when:
              the two are of one shape but not equal
              something else reads the float weight, or a reader sits in another graph
              the plan keeps either in float; the output projection's spec holds for both
              H is not divisible by the block, or the target cannot run it
Source:       com.microsoft::GatherBlockQuantized, MatMulNBits; the builder, mobius and Olive write tied models
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import onnx_ir as ir

from rewriter.emit import (
    matmul_nbits_refusal,
    on_parts,
    require_matmul_nbits,
    scale_type,
    write_integers,
)
from rewriter.graph.declines import INFER_SHAPES, ONE_SPEC, reason_of
from rewriter.operators.gather_block_quantized import TIED, LinearAndTied
from rewriter.operators.layout.stored import Refusal, Stored
from rewriter.quantize import lossless
from rewriter.quantize.job import PartTensor, QuantizationJob, packed_parts
from rewriter.quantize.plan import AccuracyLevel
from rewriter.quantize.types import QuantizedShape, WeightSpec
from rewriter.rule import Declined, Replacement, Rule, Run
from rewriter.rules.blocks.gather_block_quantized import gather
from rewriter.rules.blocks.matmul_nbits import addend, in_blocks, on_their_grid, read_weight, takes_bias
from rewriter.rules.blocks.tied import Table, inputs_of, read_table

Form = Literal["blocks", "flat"]


@dataclass(frozen=True)
class Tied:
    """A table and how it is quantized.

    Attributes:
        table: the table, its lookups and its linears.
        job: the [V, H] weight.
        linear: how MatMulNBits stores it.
        rows: how a table of its bytes does.
        equals: the same job for each constant that equals the table.
        addends: what each linear adds.
    """

    table: Table
    job: QuantizationJob
    linear: Stored
    rows: Stored
    equals: tuple[QuantizationJob, ...]
    addends: tuple[ir.Value | None, ...]

    def refusal(self, run: Run, form: Form) -> str | None:
        """Returns why the target cannot look the table up in this form, or None."""
        spec, dtype = self.job.context.spec, self.table.view.dtype.name
        row = self.job.shape[1] if form == "flat" else spec.block_size
        return run.target.lookup.refusal(dtype, row, spec.bits, spec.block_size, symmetric=spec.symmetric)

    @property
    def one_zero_point_a_byte(self) -> bool:
        """Whether a gather of blocks cannot read MatMulNBits' zero points, which share bytes."""
        spec = self.job.context.spec
        return not spec.symmetric and spec.bits < 8


class TieQuantizedEmbedding(Rule):
    """The rule at the Gather."""

    def __init__(self, form: Form, min_bytes: int, accuracy_level: AccuracyLevel | None) -> None:
        super().__init__(name="tie-quantized-embedding", remove_nodes=False)
        self._form = form
        self._min_bytes = min_bytes
        self._accuracy_level = accuracy_level

    def pattern(self, op: Any, w: Any, ids: Any) -> Any:
        return op.Gather(w, ids, _outputs=["y"])

    def rewrite(self, op: Any, *, w: ir.Value, ids: ir.Value, y: ir.Value) -> Replacement:
        node = y.producer()
        assert node is not None
        tied = read(self.run, node, self._min_bytes)
        form = _form(self.run, tied, self._form, w)
        made = [op.initializer(tensor) for tensor in _tensors(tied, form)]
        weight = made[: 2 if tied.job.context.spec.symmetric else 3]
        rows = _blocks if form == "blocks" else _flat
        new = {reader.outputs[0]: rows(op, tied, made, reader) for reader in tied.table.gathers}
        roles = {}
        for (head, _), c in zip(tied.table.heads, tied.addends, strict=True):
            bias = c if c is not None and takes_bias(self.run, tied.job.shape[0], c) else None
            x, _ = inputs_of(head)
            product = on_parts(
                self.run, op, new.get(x, x), weight, tied.job, bias=bias, accuracy_level=self._accuracy_level
            )
            roles[product] = self.run.role(head).name
            new[head.outputs[0]] = product if c is bias else op.Add(product, c)
        return Replacement(new, [], roles=roles)


def read(run: Run, node: ir.Node, min_bytes: int) -> Tied:
    """Reads the table that ``node`` looks up, or declines."""
    table = read_table(run, node, min_bytes)
    lookups = []
    for reader in table.gathers:
        _index_rank(reader)
        lookups.append(run.quantize(table.view, reader))
    addends = []
    for head, _ in table.heads:
        read_weight(run, *inputs_of(head))
        addends.append(addend(head) if head.op_type == "Gemm" else None)
    jobs = [run.quantize(own, head) for head, own in table.heads]
    spec = jobs[0].context.spec
    if any(job.context.spec != spec for job in jobs):
        raise Declined("the plan gives the linears that read the table different specs", node, remedy=ONE_SPEC)
    _, weight = inputs_of(table.heads[0][0])
    dtype = jobs[0].weight.dtype

    def refuse(shape: QuantizedShape) -> str | None:
        rows = TIED.of(shape)
        return matmul_nbits_refusal(run, shape, dtype) or (rows.reason if isinstance(rows, Refusal) else None)

    jobs = list(in_blocks(jobs, refuse))

    def hold(spec: WeightSpec) -> Tied | None:
        if refuse(jobs[0].shape_in(spec)):
            return None
        tied = _tied(run, table, lookups[0], lossless.on_grid(jobs[0], spec), addends, weight)
        return tied if any(tied.refusal(run, form) is None for form in get_args(Form)) else None

    kept = on_their_grid(run, [jobs[0].weight], [jobs[:1]], hold, node.outputs[0])
    return kept.held or _tied(run, table, lookups[0], kept.jobs[0][0], addends, weight)


def _tied(
    run: Run,
    table: Table,
    lookup: QuantizationJob,
    job: QuantizationJob,
    addends: Sequence[ir.Value | None],
    weight: ir.Value,
) -> Tied:
    linear = require_matmul_nbits(run, job, weight)
    rows = TIED.of(job.stored_shape)
    if isinstance(rows, Refusal):
        raise Declined(rows.reason, weight)
    given = job.context
    own = replace(
        lookup.context, spec=given.spec, planned=given.planned, because=given.because, off_grid=given.off_grid
    )
    equals = () if table.shared else (replace(job, weight=table.view, context=own),)
    return Tied(table, job, linear, rows, equals, tuple(addends))


def _form(run: Run, tied: Tied, wanted: Form, w: ir.Value) -> Form:
    """Returns the form that is wanted, or flat where the target can only look that one up; declines where neither."""
    forms: tuple[Form, ...] = (wanted, "flat")
    reason: str | None = None
    for form in forms:
        reason = tied.refusal(run, form)
        if reason is None:
            return form
    raise Declined(f"GatherBlockQuantized on {run.target}: {reason}", w, remedy=reason_of(reason or "").remedy)


def _tensors(tied: Tied, form: Form) -> tuple[PartTensor, ...]:
    """Returns B, scales, zero points where asymmetric, and these one to a byte where a gather of blocks needs them."""
    both = form == "blocks" and tied.one_zero_point_a_byte
    stored = LinearAndTied(tied.linear, tied.rows) if both else tied.linear
    return packed_parts(tied.job, stored, tied.job.context.weight, scale_type(tied.job), tied.equals)


def _blocks(op: Any, tied: Tied, made: Sequence[ir.Value], reader: ir.Node) -> Any:
    """Looks blocks up in MatMulNBits' own B, so that the runtime keeps one table, and joins them to rows."""
    spec = tied.job.context.spec
    v, h = tied.job.shape
    apart = write_integers(op, [v, h // spec.block_size, 1], "shape")
    others = [op.Reshape(made[1], apart)]
    if not spec.symmetric:
        others.append(made[3] if tied.one_zero_point_a_byte else op.Reshape(made[2], apart))
    blocks = gather(op, made[0], reader.inputs[1], others, bits=spec.bits, block=spec.block_size, axis=2)
    return op.Reshape(blocks, write_integers(op, [0] * _index_rank(reader) + [h], "shape"))


def _flat(op: Any, tied: Tied, made: Sequence[ir.Value], reader: ir.Node) -> Any:
    """Looks rows up in B reshaped, which the runtime folds into a table of its own."""
    spec = tied.job.context.spec
    v, h = tied.job.shape
    table = op.Reshape(made[0], write_integers(op, [v, h * spec.bits // 8], "shape"))
    return gather(op, table, reader.inputs[1], made[1:3], bits=spec.bits, block=spec.block_size, axis=1)


def _index_rank(reader: ir.Node) -> int:
    index = reader.inputs[1]
    if index is None or index.shape is None:
        raise Declined("the rank of the index is unknown", index, remedy=INFER_SHAPES)
    return index.shape.rank()


def rule(*, form: Form = "blocks", min_bytes: int = 4096, accuracy_level: AccuracyLevel | None = None) -> Rule:
    """Builds the rule.

    Args:
        form: blocks shares the table as MatMulNBits holds it, where the target can look it up so; flat reshapes it.
        min_bytes: smaller tables stay float.
        accuracy_level: 0 leaves it to the runtime, 4 allows activations of 8 bits, null is as the rule set says.
    """
    return TieQuantizedEmbedding(form, min_bytes, accuracy_level)

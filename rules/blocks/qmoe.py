"""What the rules about QMoE nodes share: choosing how its weights are held, and writing one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.emit import write_operator
from rewriter.graph.declines import NAME_ARCHITECTURE, ONE_SPEC, OTHER_BITS, OTHER_BLOCK_SIZE, OTHER_TARGET, UNROLLED
from rewriter.operators.form import ExpertForm
from rewriter.operators.layout.stored import Layout, Refusal
from rewriter.operators.qmoe import LAYOUT_KEY, QMOE, RAW, ROUTER_WEIGHTS, layout_named
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.stack import packed_stack
from rewriter.quantize.types import QuantizedShape, WeightSpec
from rewriter.rule import Declined, Run
from rewriter.rules.blocks.moe import Experts, Projection, flat_router
from rewriter.target import Kernel, Target

Jobs = tuple[QuantizationJob, ...]


@dataclass(frozen=True)
class Held:
    """How the weights of an MoE will be held.

    Attributes:
        jobs: of each projection, one for each expert.
        block: input features per scale of all projections; 0 is the whole row.
        layout: of the weights.
        accuracy_level: the attribute; 0 leaves it out.
    """

    jobs: tuple[Jobs, ...]
    block: int
    layout: Layout
    accuracy_level: int = 0

    @property
    def specs(self) -> tuple[WeightSpec, ...]:
        """The spec that all experts of each projection share."""
        return tuple(jobs[0].context.spec for jobs in self.jobs)


def plan_experts(run: Run, rule: str, experts: Experts, *, smaller_blocks: bool) -> Held:
    """Asks the plan about every expert and settles on one form that the operator and the target have, or declines.

    Args:
        run: the present run.
        rule: name of the asking rule.
        experts: the MoE.
        smaller_blocks: whether a smaller block than the planned one may be taken.
    """
    kernel = run.target.kernel(QMOE.name)
    if kernel is None or kernel.blocks is None or not run.target.qmoe_layouts:
        if kernel is None:
            raise Declined(f"target {run.target} has no QMoE", experts.node, remedy=f"{OTHER_TARGET}, or {UNROLLED}")
        reason = f"target {run.target} has no QMoE unless an architecture is named (cuda:sm80, cuda:sm90)"
        raise Declined(reason, experts.node, remedy=NAME_ARCHITECTURE)
    layout = layout_named(run.target.qmoe_layouts[0])
    asked = tuple(_jobs(run, rule, experts, projection) for projection in experts.projections)
    specs = tuple(jobs[0].context.spec for jobs in asked)
    _require_one_form(run.target, kernel, experts, specs)
    blocks = {spec.block_size for spec in specs}
    if len(blocks) > 1 and 0 in blocks:
        raise Declined(
            "QMoE has one block size, and the plan asks for blocks and for whole rows",
            experts.node,
            remedy=OTHER_BLOCK_SIZE,
        )
    planned = min(blocks)
    sizes = tuple(2**power for power in range(planned.bit_length() - 1, 3, -1)) if planned and smaller_blocks else ()
    reasons = {size: _illegal(kernel, asked, size, layout) for size in dict.fromkeys((planned, *sizes))}
    block = next((size for size, reason in reasons.items() if reason is None), None)
    if block is None:
        others = ", ".join(str(size) for size in reasons if size != planned)
        raise Declined(f"{reasons[planned]}{f'; nor do smaller blocks fit ({others})' if others else ''}", experts.node)
    return Held(tuple(tuple(_with_block(job, block) for job in jobs) for jobs in asked), block, layout)


def emit_qmoe(op: Any, target: Target, experts: Experts, held: Held, *, weighted: bool) -> Any:
    """Writes the QMoE.

    Args:
        op: onnxscript's builder.
        target: says which attributes and inputs the operator has.
        experts: the MoE.
        held: how its weights are held.
        weighted: whether the softmax of the logits is given as router_weights.
    """
    router = flat_router(op, experts.router, experts.projections[0].weight.shape[0])
    inputs: dict[int, ir.Value | None] = {0: experts.x, 1: router}
    for slots, projection, jobs in zip(QMOE.projections, experts.projections, held.jobs, strict=False):
        stored = held.layout.require(jobs[0].stored_shape)
        tensors = packed_stack(jobs, stored, projection.weight.name, experts.dtype)
        inputs |= dict(zip(slots.parts, map(op.initializer, tensors), strict=False))
        inputs[slots.bias] = projection.bias
    inputs[ROUTER_WEIGHTS] = op.Softmax(router, axis=-1) if weighted else None
    return write_qmoe(op, inputs, qmoe_attributes(target, experts.form, held), held.layout)


def write_qmoe(
    op: Any, inputs: Mapping[int, ir.Value | None], attributes: Mapping[str, int | float | str], layout: Layout
) -> ir.Value:
    """Writes a QMoE, stamped with the layout of its weights.

    Args:
        op: onnxscript's builder.
        inputs: by slot.
        attributes: of the node.
        layout: of its weights.
    """
    out = write_operator(op, QMOE, [inputs.get(slot) for slot in range(len(QMOE.inputs))], attributes)
    producer = out.producer()
    assert producer is not None
    producer.metadata_props[LAYOUT_KEY] = layout.name
    return out


def qmoe_attributes(target: Target, form: ExpertForm, held: Held) -> dict[str, int | float | str]:
    """Returns the attributes of a QMoE, each only where the target's operator has it."""
    found = form.attributes()
    bits = [spec.bits for spec in held.specs]
    found["expert_weight_bits"] = bits[0]
    found |= {f"fc{i}_expert_weight_bits": own for i, own in enumerate(bits, 1) if own != bits[0]}
    if held.block:
        found["block_size"] = held.block
    found |= prepacked_attribute(target, held.layout)
    if held.accuracy_level:
        found["accuracy_level"] = held.accuracy_level
    return found


def prepacked_attribute(target: Target, layout: Layout) -> dict[str, int]:
    """Returns the attribute that says whether weights are raw, where the target's operator has it."""
    return {"weights_prepacked": int(layout is not RAW)} if target.has(QMOE.name, "weights_prepacked") else {}


def _jobs(run: Run, rule: str, experts: Experts, projection: Projection) -> Jobs:
    role = _role(experts.form, projection.name)
    jobs: list[QuantizationJob] = []
    reasons: dict[str, int] = {}
    for expert in range(projection.weight.shape[0]):
        weight = projection.weight.index(0, expert)
        try:
            jobs.append(
                run.quantize(weight, experts.node, rule, experts.dtype.numpy(), role=f"expert.{role}", expert=expert)
            )
        except Declined as declined:
            reasons.setdefault(declined.reason, expert)
    for reason, expert in reasons.items():
        where = f"expert {expert} of {projection.name}: " if jobs or len(reasons) > 1 else f"{projection.name}: "
        whole = "; QMoE quantizes a stack whole" if jobs else ""
        raise Declined(f"{where}{reason}{whole}", projection.value)
    first = jobs[0].context.spec
    for job in jobs:
        if job.context.spec != first:
            raise Declined(
                f"QMoE quantizes a stack whole, and the plan gives expert 0 of {projection.name} {_show(first)} and"
                f" expert {job.context.expert} {_show(job.context.spec)}",
                projection.value,
                remedy=ONE_SPEC,
            )
    return tuple(jobs)


def _role(form: ExpertForm, name: str) -> str:
    if name == "fc2":
        return "down"
    if name == "fc3":
        return "up"
    return "gate" if form.gated else "gate_up" if form.fused > 1 else "up"


def _show(spec: WeightSpec) -> str:
    return f"{spec.bits} bits in blocks of {spec.block_size}, {'symmetric' if spec.symmetric else 'asymmetric'}"


def _require_one_form(target: Target, kernel: Kernel, experts: Experts, specs: Sequence[WeightSpec]) -> None:
    """Declines where the projections differ in what the target's kernel must have in common."""
    assert kernel.blocks is not None
    for projection, spec in zip(experts.projections, specs, strict=True):
        if spec.bits not in kernel.blocks:
            runs = ", ".join(map(str, kernel.blocks))
            raise Declined(
                f"QMoE on target {target} runs {runs} bits, not {spec.bits}", projection.value, remedy=OTHER_BITS
            )
    bits = [spec.bits for spec in specs]
    if len(set(bits)) > 1 and not (kernel.mixed_bits and target.has(QMOE.name, "fc2_expert_weight_bits")):
        shown = " and ".join(f"{p.name} {b}" for p, b in zip(experts.projections, bits, strict=True))
        raise Declined(
            f"no kernel of target {target} runs projections of different bits ({shown})", experts.node, remedy=ONE_SPEC
        )
    if len({spec.symmetric for spec in specs}) > 1 and not kernel.mixed_zero_points:
        raise Declined(
            f"QMoE on target {target} takes zero points for all projections or for none", experts.node, remedy=ONE_SPEC
        )


def _illegal(kernel: Kernel, asked: Sequence[Jobs], block: int, layout: Layout) -> str | None:
    """Returns why the projections cannot have this block size, or None."""
    shapes = [dataclasses.replace(job.stored_shape, block=block) for job, *_ in asked]
    return refusal(kernel, shapes, layout)


def refusal(kernel: Kernel, projections: Sequence[QuantizedShape], layout: Layout) -> str | None:
    """Returns why the kernel cannot run projections that are quantized so, or None."""
    assert kernel.blocks is not None
    block = projections[0].block
    for own in projections:
        stored = layout.of(own)
        if isinstance(stored, Refusal):
            return stored.reason
        if block not in kernel.blocks.get(own.bits, ()):
            return f"the target has no kernel for {own.bits} bits in blocks of {block}"
        if own.k % kernel.multiple:
            return f"K = {own.k} is not a multiple of {kernel.multiple}, as the target's kernel needs"
        if not own.symmetric and block not in kernel.zero_point_blocks:
            return f"the target takes no zero points in blocks of {block}"
    single = [own.k == block for own in projections]
    if kernel.single_block == "never" and any(single):
        return f"the target runs no rows of one block of {block}"
    if kernel.single_block == "alike" and any(single) and not all(own.symmetric for own in projections):
        return f"the target takes no zero points where a row is one block of {block}"
    if kernel.single_block == "alike" and single[0] and not all(single):
        return f"the target runs no rows of one block of {block} in fc1 beside rows of several"
    return None


def _with_block(job: QuantizationJob, block: int) -> QuantizationJob:
    spec = job.context.spec
    if spec.block_size == block:
        return job
    own = dataclasses.replace(spec, block_size=block)
    return dataclasses.replace(job, context=dataclasses.replace(job.context, spec=own, planned=spec))

"""What the rules about QMoE nodes share: choosing how its weights are held, and writing one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.emit import write_operator
from rewriter.errors import RewriterWarning
from rewriter.graph.declines import NAME_ARCHITECTURE, ONE_SPEC, OTHER_BLOCK_SIZE, ROUNDED, Reason, no_kernel, reason_of
from rewriter.operators.form import ExpertForm
from rewriter.operators.layout.stored import Layout, Refusal
from rewriter.operators.matmul_nbits import MATMUL_NBITS, attributes_of
from rewriter.operators.qmoe import LAYOUT_KEY, QMOE, QUANT_TYPES, ROUTER_WEIGHTS, layout_named, weights_prepacked
from rewriter.quantize.formats import FORMATS, INT, FormatName
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.stack import packed_stack
from rewriter.quantize.types import QuantizedShape, WeightSpec
from rewriter.rule import Declined, Run
from rewriter.rules.blocks.matmul_nbits import on_their_grid
from rewriter.rules.blocks.moe import Experts, Projection, flat_router
from rewriter.target import Kernel, Target

ONE_BLOCK_SIZE = "QMoE has one block size for all projections"

Jobs = tuple[QuantizationJob, ...]


@dataclass(frozen=True)
class KernelChoice:
    """A kernel of QMoE that computes a form as it is meant.

    Attributes:
        kernel: the kernel.
        weighted: whether it does so where the softmax of the logits is given as router_weights.
    """

    kernel: Kernel
    weighted: bool


@dataclass(frozen=True)
class QuantizedForm:
    """How the weights of an MoE will be held.

    Attributes:
        jobs: of each projection, one for each expert.
        block: input features per scale of all projections; 0 is the whole row.
        layout: of the weights.
        choice: what runs them.
        accuracy_level: the attribute; 0 leaves it out.
    """

    jobs: tuple[Jobs, ...]
    block: int
    layout: Layout
    choice: KernelChoice
    accuracy_level: int = 0

    @property
    def specs(self) -> tuple[WeightSpec, ...]:
        """The spec that all experts of each projection share."""
        return tuple(jobs[0].context.spec for jobs in self.jobs)


def exact_kernels(target: Target, form: ExpertForm, dtype: ir.DataType) -> Sequence[KernelChoice] | str:
    """Returns how kernels of the target compute a QMoE of a form, the preferred first, or why none does."""
    plain = target.runs(QMOE.name, form, dtype.name)
    given = target.runs(QMOE.name, form, dtype.name, weighted=True)
    alone, with_weights = (() if isinstance(found, str) else found for found in (plain, given))
    kernels = [kernel for kernel in target.kernels(QMOE.name) if kernel in alone or kernel in with_weights]
    if kernels or not isinstance(plain, str):
        return [KernelChoice(kernel, weighted=kernel not in alone) for kernel in kernels]
    if given == plain:
        return plain
    return Reason(f"{plain}; router_weights would be needed, and {given}", reason_of(plain).remedy)


def plan_experts(
    run: Run, experts: Experts, choices: Sequence[KernelChoice], *, smaller_blocks: bool = True, together: bool = False
) -> QuantizedForm:
    """Asks the plan about every expert and settles on one form that the operator and the target have, or declines.

    The first is taken that a kernel runs: as planned, in smaller blocks, without zero points.

    Args:
        run: the present run.
        experts: the MoE.
        choices: how kernels of the target compute such a node.
        smaller_blocks: whether another form than the planned one may be taken.
        together: whether the experts cannot be taken apart, so that weights keep their grid only beside a kernel that
            does not round activations unasked; else the plan's next algorithm quantizes them.
    """
    asked = tuple(_jobs(run, experts, projection) for projection in experts.projections)
    specs = [jobs[0].context.spec for jobs in asked]
    views = [projection.weight for projection in experts.projections]

    def exact(spec: WeightSpec) -> Sequence[KernelChoice]:
        if run.rounded_activations or not together:
            return choices
        return [choice for choice in choices if not choice.kernel.rounds_activations(spec.bits, spec.block_size)]

    kept = on_their_grid(run, views, asked, lambda spec: _held_on(spec, exact(spec), asked), experts.node)
    asked = kept.jobs
    if kept.held is not None:
        choice, layout = kept.held
        return QuantizedForm(asked, asked[0][0].context.spec.block_size, layout, choice)
    fitting = _with_widths(run.target, choices, experts, specs)
    blocks = {spec.block_size for spec in specs}
    if len(blocks) > 1 and 0 in blocks:
        reason = "QMoE has one block size, and the plan asks for blocks and for whole rows"
        raise Declined(reason, experts.node, remedy=OTHER_BLOCK_SIZE)
    planned = min(blocks)
    sizes = [planned, *(2**power for power in range(planned.bit_length() - 2, 3, -1))] if planned else [0]
    wanted = [(size, False) for size in sizes]
    if not any(spec.symmetric for spec in specs):
        wanted += [(size, True) for size in sizes]
    reasons: list[str] = []
    for block, symmetric in wanted if smaller_blocks else wanted[:1]:
        shapes = [_shape(jobs[0], block, symmetric=symmetric) for jobs in asked]
        for choice in fitting:
            for layout in map(layout_named, choice.kernel.layouts):
                refused = refusal(choice.kernel, shapes, layout)
                if refused is None:
                    because = [ONE_BLOCK_SIZE] * len(asked)
                    if (block, symmetric) != wanted[0]:
                        because = _because(asked, planned, reasons[len(fitting[0].kernel.layouts) - 1])
                    forms = zip(asked, because, strict=True)
                    held = tuple(_as_held(jobs, block, symmetric, why) for jobs, why in forms)
                    return QuantizedForm(held, block, layout, choice)
                reasons.append(refused)
    others = ", ".join(map(str, sizes[1:])) if smaller_blocks else ""
    first = reason_of(reasons[len(fitting[0].kernel.layouts) - 1])  # of raw weights, where the kernel reads them
    smaller = f"; nor do smaller blocks fit ({others})" if others else ""
    raise Declined(f"{first}{smaller}", experts.node, remedy=first.remedy)


def _held_on(
    spec: WeightSpec, choices: Sequence[KernelChoice], asked: Sequence[Jobs]
) -> tuple[KernelChoice, Layout] | None:
    """Returns which kernel runs weights on a grid, and in which layout, or None."""
    shapes = [job.shape_in(spec) for job, *_ in asked]
    return next(
        (
            (choice, layout)
            for choice in choices
            for layout in map(layout_named, choice.kernel.layouts)
            if refusal(choice.kernel, shapes, layout) is None
        ),
        None,
    )


def _with_widths(
    target: Target, choices: Sequence[KernelChoice], experts: Experts, specs: Sequence[WeightSpec]
) -> Sequence[KernelChoice]:
    """Returns the kernels that run codes of these formats and widths of fc1, fc2 and perhaps fc3, or declines."""
    bits, formats = [spec.bits for spec in specs], [spec.format for spec in specs]
    if not any(choice.kernel.layouts for choice in choices):
        reason = f"target {target} has no QMoE unless an architecture is named (cuda:sm80, cuda:sm90)"
        raise Declined(reason, experts.node, remedy=NAME_ARCHITECTURE)
    known = [choice for choice in choices if choice.kernel.unknown_format(formats) is None]
    if not known:
        raise no_kernel(QMOE.name, target, choices[0].kernel.unknown_format(formats) or "", experts.node)
    fitting = [choice for choice in known if choice.kernel.unknown_widths(bits) is None]
    if not fitting:
        raise no_kernel(QMOE.name, target, known[0].kernel.unknown_widths(bits) or "", experts.node)
    return fitting


def emit_qmoe(op: Any, run: Run, experts: Experts, held: QuantizedForm) -> Any:
    """Writes the QMoE, or declines as ``write_qmoe`` does.

    Args:
        op: onnxscript's builder.
        run: the present run.
        experts: the MoE.
        held: how its weights are held.
    """
    router = flat_router(op, experts.router, experts.projections[0].weight.shape[0])
    inputs: dict[int, ir.Value | None] = {0: experts.x, 1: router}
    for slots, projection, jobs in zip(QMOE.projections, experts.projections, held.jobs, strict=False):
        stored = held.layout.require(jobs[0].stored_shape)
        tensors = packed_stack(jobs, stored, projection.weight.name, experts.dtype)
        parts = slots.parts(global_scale=FORMATS[stored.shape.format].global_scale)
        inputs |= dict(zip(parts, map(op.initializer, tensors), strict=False))
        inputs[slots.bias] = projection.bias
    inputs[ROUTER_WEIGHTS] = op.Softmax(router, axis=-1) if held.choice.weighted else None
    attributes = qmoe_attributes(run.target, experts.form, held)
    return write_qmoe(op, run, held.choice.kernel, inputs, attributes, held.layout, experts.node)


def require_accepted_rounding(
    run: Run, kernel: Kernel, attributes: Mapping[str, Any], culprit: ir.Node | ir.Value, *, instead: str = ""
) -> None:
    """Declines a QMoE whose kernel rounds activations where neither the run nor its attributes accept it.

    Args:
        run: the present run.
        kernel: what will run the node.
        attributes: of the node.
        culprit: the node or value at fault.
        instead: what else gives small weights there.
    """
    if run.rounded_activations or attributes.get("accuracy_level") == 4:
        return
    bits = [value for name, value in attributes.items() if name.endswith("expert_weight_bits")]
    block = attributes.get("block_size", 0)
    for own in bits:
        if kernel.rounds_activations(own, block):
            how = f"to 8 bits at {own} bits in blocks of {block}"
            if kernel.format != INT.name:
                how = f"of {' or '.join(kernel.dtypes)} beside weights in {kernel.format}"
            reason = f"QMoE on target {run.target} rounds activations {how}"
            raise Declined(reason, culprit, remedy=f"{ROUNDED}{instead and f', or {instead}'}")


def write_qmoe(
    op: Any,
    run: Run,
    kernel: Kernel,
    inputs: Mapping[int, ir.Value | None],
    attributes: Mapping[str, Any],
    layout: Layout,
    culprit: ir.Node | ir.Value,
) -> ir.Value:
    """Writes a QMoE, stamped with the layout of its weights; declines where it would round unasked.

    Args:
        op: onnxscript's builder.
        run: the present run.
        kernel: what will run the node.
        inputs: by slot.
        attributes: of the node.
        layout: of its weights.
        culprit: the node or value that is rewritten.
    """
    require_accepted_rounding(run, kernel, attributes, culprit)
    out = write_operator(op, QMOE, [inputs.get(slot) for slot in range(len(QMOE.inputs))], attributes)
    producer = out.producer()
    assert producer is not None
    producer.metadata_props[LAYOUT_KEY] = layout.name
    return out


def qmoe_attributes(target: Target, form: ExpertForm, held: QuantizedForm) -> dict[str, int | float | str]:
    """Returns the attributes of a QMoE, each only where the target's operator has it."""
    found = form.attributes()
    bits = [spec.bits for spec in held.specs]
    found["expert_weight_bits"] = bits[0]
    found |= {f"fc{i}_expert_weight_bits": own for i, own in enumerate(bits, 1) if own != bits[0]}
    if held.block:
        found["block_size"] = held.block
    own = held.specs[0].format
    if own != INT.name:
        found["quant_type"] = QUANT_TYPES[own]
    found |= prepacked_attribute(target, held.layout, own)
    if held.accuracy_level:
        found["accuracy_level"] = held.accuracy_level
    return found


def carried_accuracy_level(target: Target, nodes: Iterable[ir.Node]) -> dict[str, int]:
    """Returns the attribute where it is the same of all MatMulNBits among the nodes; where it is dropped, a warning."""
    levels = {attributes_of(node).accuracy_level for node in nodes if MATMUL_NBITS.computes(node)}
    if not any(levels):
        return {}
    if len(levels) == 1 and supports_accuracy_level(target):
        return {"accuracy_level": levels.pop()}
    why = f"target {target} has none" if len(levels) == 1 else "those of its experts differ"
    warnings.warn(f"a fused block is left without its accuracy_level: {why}", RewriterWarning, stacklevel=2)
    return {}


def supports_accuracy_level(target: Target) -> bool:
    """Whether the attribute means something to the QMoE of a target."""
    return target.provider == "cpu" and target.has(QMOE.name, "accuracy_level")


def prepacked_attribute(target: Target, layout: Layout, own: FormatName = "int") -> dict[str, int]:
    """Returns the attribute that says how weights lie, where the target's operator has it."""
    return {"weights_prepacked": weights_prepacked(layout, own)} if target.has(QMOE.name, "weights_prepacked") else {}


def _jobs(run: Run, experts: Experts, projection: Projection) -> Jobs:
    role = _role(experts.form, projection.name)
    jobs: list[QuantizationJob] = []
    reasons: dict[str, int] = {}
    for expert in range(projection.weight.shape[0]):
        weight = projection.weight.index(0, expert)
        try:
            jobs.append(run.quantize(weight, experts.node, role=f"expert.{role}", expert=expert))
        except Declined as declined:
            reasons.setdefault(declined.reason, expert)
    for reason, expert in reasons.items():
        where = f"expert {expert} of {projection.name}: " if jobs or len(reasons) > 1 else f"{projection.name}: "
        whole = "; QMoE quantizes a stack whole" if jobs else ""
        raise Declined(f"{where}{reason}{whole}", projection.value)
    first = jobs[0].context.spec
    for job in jobs:
        if job.context.spec is not first and job.context.spec != first:
            raise Declined(
                f"QMoE quantizes a stack whole, and the plan gives expert 0 of {projection.name} {first.form} and"
                f" expert {job.context.expert} {job.context.spec.form}",
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


def refusal(kernel: Kernel, projections: Sequence[QuantizedShape], layout: Layout) -> str | None:
    """Returns why the kernel cannot run projections that are quantized so, or None."""
    held = map(layout.of, projections)
    illegal = next((own.reason for own in held if isinstance(own, Refusal)), None)
    return illegal or kernel.cannot_hold(projections, layout.name)


def _shape(job: QuantizationJob, block: int, *, symmetric: bool) -> QuantizedShape:
    shape = job.stored_shape
    return dataclasses.replace(shape, block=block, symmetric=shape.symmetric or symmetric)


def _because(asked: Sequence[Jobs], block: int, reason: str) -> list[str]:
    """Says of each projection why it has not the planned form, which may be for another's sake."""
    own = [layout_named("raw").of(_shape(jobs[0], block, symmetric=False)) for jobs in asked]
    refused = [found.reason if isinstance(found, Refusal) else "" for found in own]
    at = refused.index(reason) if reason in refused else None
    others = "" if at is None else f"{ONE_BLOCK_SIZE}, and of {asked[at][0].context.role} {reason}"
    return [why or others or reason for why in refused]


def _as_held(jobs: Jobs, block: int, symmetric: bool, because: str) -> Jobs:
    spec = jobs[0].context.spec
    own = dataclasses.replace(spec, block_size=block, symmetric=spec.symmetric or symmetric)
    if own == spec:
        return jobs
    contexts = (dataclasses.replace(job.context, spec=own, planned=spec, because=because) for job in jobs)
    return tuple(dataclasses.replace(job, context=context) for job, context in zip(jobs, contexts, strict=True))

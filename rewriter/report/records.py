"""The records that a report consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Application:
    """One rewrite that happened.

    Attributes:
        rule: the rule's name.
        phase: the phase in which it fired.
        sweep: the sweep of that phase, from 1.
        node: name of the node at which the pattern matched.
        replaced: operator types that went.
        by: operator types that came.
        proof: index into ``Report.proofs``, or None where nothing had to be run.
        removed: names of the nodes that left the model, those included that only they kept alive.
    """

    rule: str
    phase: str
    sweep: int
    node: str
    replaced: tuple[str, ...]
    by: tuple[str, ...]
    proof: int | None
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decline:
    """One place where a rule was about to fire and did not.

    Attributes:
        rule: the rule's name.
        phase: the phase in which it was tried.
        node: name of the node at which the pattern matched.
        reason: why not.
        culprit: name of the node or value at fault.
        remedy: what would have to change for the rule to fire; empty where nothing is known.
        expected: whether the rule set means it so, or the rule is about other weights, so that nothing is amiss.
        failed: whether there was a rewrite and its proof failed: the rule is wrong here, and the model was left alone.
    """

    rule: str
    phase: str
    node: str
    reason: str
    culprit: str
    remedy: str = ""
    expected: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Proof:
    """How the rewrites of one structural class were shown to be right.

    Attributes:
        rule: the rule's name.
        runtime: what ran both sides.
        max_relative: largest error over the largest magnitude of the expected output.
        tolerance: what it was held against.
        node: the application that was run.
        skipped: why nothing was run; empty where it was.
        because: why the reference operators judged and ONNX Runtime did not; empty where it did.
        experts: how many experts of a stack were run, where it is too large to run all; else None.
        ran: whether both sides were run; where not, ``skipped`` says why, and ``max_relative`` means nothing.
    """

    rule: str
    runtime: str
    max_relative: float
    tolerance: float
    node: str
    skipped: str = ""
    because: str = ""
    experts: int | None = None
    ran: bool = True


@dataclass(frozen=True)
class Weight:
    """One quantized weight, known when it has been written.

    Attributes:
        name: as ``WeightContext.weight`` has it; no other weight of the model has it.
        node: the node that reads it.
        role: what it is for; empty where the structure does not tell.
        layer: index of its layer, or None.
        expert: index of its expert, or None.
        shape: (N, K), output and input features.
        algorithm: how it was quantized.
        bits: width of a code.
        block_size: input features per scale; 0 for a whole row.
        symmetric: whether it has no zero points.
        bytes_before: as a float weight.
        bytes_after: codes, scales and zero points.
        relative_rms: root mean square error over that of the weight.
        planned_block_size: what the plan asked for, where the operator has no such block for this weight; else None.
        planned_algorithm: what the plan asked for, where that could not be done for want of known inputs; else None.
        uncalibrated: why no inputs are known, where that decided the algorithm; else empty.
        output_rms: root mean square error of its output over that of the output, on what it saw when the model was
            calibrated; None where that is not known, or was nothing.
        format: what codes and scales are: int, mxfp4 or nvfp4.
        sources: names of the model's constants that it is made of.
        grid: ``kept as it was trained`` where it lies on a grid of few bits and is written as that; which block is off,
            where nearly all of it lies on one; else empty.
        form: width, blocks and zero points, in words.
        planned_form: likewise what the plan asked for, where that is another form; else empty.
        because: why it is another form than the planned one.
    """

    name: str
    node: str
    role: str
    layer: int | None
    expert: int | None
    shape: tuple[int, int]
    algorithm: str
    bits: int
    block_size: int
    symmetric: bool
    bytes_before: int
    bytes_after: int
    relative_rms: float
    planned_block_size: int | None = None
    planned_algorithm: str | None = None
    uncalibrated: str = ""
    output_rms: float | None = None
    format: str = "int"
    sources: tuple[str, ...] = ()
    grid: str = ""
    form: str = ""
    planned_form: str = ""
    because: str = ""


@dataclass(frozen=True)
class RoleSummary:
    """The quantized weights of one role.

    Attributes:
        role: what they are for; empty where the structure does not tell.
        count: how many there are.
        bits: the widths of their codes, ascending.
        elements: how many numbers they hold.
        bytes_before: as float weights.
        bytes_after: codes, scales and zero points.
        mean_relative_rms: mean over the weights.
        worst: the weight with the largest error.
    """

    role: str
    count: int
    bits: tuple[int, ...]
    elements: int
    bytes_before: int
    bytes_after: int
    mean_relative_rms: float
    worst: Weight

    @property
    def bits_per_element(self) -> float:
        """Bits stored for each number, scales and zero points included."""
        return self.bytes_after * 8 / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Size:
    """Bytes of the tensors of one family of roles.

    Attributes:
        family: first part of the role, as ``expert`` or ``attention``; empty for norms, biases, tables of constants and
            all else of which the structure tells nothing.
        bytes_before: in the model that was given.
        bytes_after: in the rewritten model.
    """

    family: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Left:
    """A weight that stays float: a matrix or a stack of them.

    Attributes:
        name: its name.
        role: what it is for; empty where the structure does not tell.
        nbytes: its size.
        readers: operators that read it.
        rule: the rule that declined where it is read; empty where none came near.
        reason: why that rule declined, or why none came near.
        remedy: what would have to change for it to be quantized; empty where nothing is known.
    """

    name: str
    role: str
    nbytes: int
    readers: tuple[str, ...]
    rule: str = ""
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Misfit:
    """A node of the rewritten model that the target refuses, or computes wrongly.

    Attributes:
        node: its name.
        reason: the operator, the target and why.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class Metrics:
    """How ``actual`` differs from ``expected``, in double precision.

    Where both hold the same infinity, or both NaN, they agree and the element is left out. Where only one is not
    finite, or the infinities differ, nothing is close: relative_l2 and max_abs are inf, cosine is 0 and snr_db is -inf.

    Attributes:
        relative_l2: ||actual - expected|| / ||expected||; 0 where both are zero, inf where only expected is.
        max_abs: largest absolute difference.
        worst_index: where it is; () for scalars and where nothing differs.
        cosine: of the angle between them; 1 where they are equal.
        snr_db: 20 log10(||expected|| / ||difference||); inf where they are equal.
        top1: share of rows (of the last axis) whose largest element is at the same place; None unless logits.
        kl: mean over rows of KL(softmax(expected) || softmax(actual)), in nats; None unless logits.
        finite: share of the elements that are finite on both sides.
        undefined: whether the original itself holds NaN or infinity wherever nothing is close.
    """

    relative_l2: float
    max_abs: float
    worst_index: tuple[int, ...]
    cosine: float
    snr_db: float
    top1: float | None = None
    kl: float | None = None
    finite: float = 1.0
    undefined: bool = False

    @property
    def compared(self) -> bool:
        """False where no element is finite on either side, so that agreeing says nothing."""
        return self.finite > 0 or self.max_abs > 0


@dataclass(frozen=True)
class Comparison:
    """The rewritten model against the original, on the same inputs.

    Attributes:
        runtime: what ran them; empty where they were not compared.
        seed: of the random inputs; None for inputs that were given.
        outputs: by output name, in the order of the model.
        skipped: why they were not compared; empty where they were, or where comparing failed.
        failures: limits that do not hold, or why a comparison that was asked for could not be made.
    """

    runtime: str = ""
    seed: int | None = None
    outputs: Mapping[str, Metrics] = field(default_factory=dict)
    skipped: str = ""
    failures: tuple[str, ...] = ()

    @property
    def worst_first(self) -> tuple[tuple[str, Metrics], ...]:
        """The outputs as people read them: logits, then the others, by how far they are apart."""
        return tuple(sorted(self.outputs.items(), key=lambda item: (item[1].top1 is None, -item[1].relative_l2)))

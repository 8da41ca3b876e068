"""One proof, in four steps: choose a runtime that may judge, run both sides, compare, allow for float16 rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.engine.context import ModelRun
from rewriter.engine.proposal import Rewrite
from rewriter.errors import ProofError, RuntimeEndedError, TargetError, UnprovedError
from rewriter.facts import Facts
from rewriter.graph.walk import readers, walk
from rewriter.operators.form import is_experts
from rewriter.parity.claims import require_positive
from rewriter.parity.difference import Difference, differences, relative
from rewriter.parity.edges import Variation, lacks_rows, variations
from rewriter.parity.float32 import HALVES, widened
from rewriter.parity.judge import cannot_judge, cannot_run
from rewriter.parity.runtime import TIMEOUT, ReferenceRuntime, Runtime, run_both
from rewriter.parity.sessions import Outcome
from rewriter.parity.subgraph import Subgraph
from rewriter.parity.subgraph_inputs import FIRST, Feeds, random_feeds, related_nodes
from rewriter.parity.weights import dequantized, experts_to_run, float_bytes
from rewriter.report import Proof
from rewriter.rule import Declined
from rewriter.tensors import View

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]

SEVERAL = 1 << 20
"""Bytes of float weights up to which a rewrite is run with several numbers of rows: beyond, loading them costs most."""

_VAST = 1e9
"""Weights beyond which the product of three, as a gated expert has them, may be no float32."""

_MATRIX = 2
_MULTIPLY = ("MatMul", "Gemm", "Einsum", "Gather", "GatherND")


@dataclass
class Sides:
    """The two sides of a rewrite.

    Attributes:
        rewrite: what is to be proved.
        names: of the values in both sides' models.
        before: the matched nodes.
        after: what takes their place.
        size: bytes of the larger side's weights in float32.
        facts: of the model.
    """

    rewrite: Rewrite
    names: dict[ir.Value, str]
    before: Subgraph
    after: Subgraph
    size: int
    facts: Facts

    @classmethod
    def of(cls, rewrite: Rewrite, run: ModelRun) -> Sides:
        """Returns the sides of a rewrite that is not committed yet."""
        names: dict[ir.Value, str] = {}
        imports = {**rewrite.imports, **rewrite.opsets}
        related = related_nodes(rewrite)
        matched, layouts = {*rewrite.matched, *related}, rewrite.layouts
        before = Subgraph(names, list(rewrite.outputs), matched, run.facts, imports, layouts=layouts)
        kept = {node for node in rewrite.matched if rewrite.outputs.keys().isdisjoint(node.outputs)}
        inside = {*rewrite.nodes, *related, *kept}
        after = Subgraph(names, list(rewrite.outputs.values()), inside, run.facts, imports, rewrite.outputs)
        return cls(rewrite, names, before, after, float_bytes((before, after), rewrite.jobs), run.facts)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (*self.rewrite.matched, *self.rewrite.nodes)

    def sample(self, *limits: int) -> bool:
        """Restricts the proof to a few experts of a stack where all together exceed a limit; tries each limit in turn.

        False where a sample of no limit can be run, and the whole is larger than the last.
        """
        for most in limits:
            experts = experts_to_run((self.before, self.after), self.size, most) if self.size > most else None
            self.before.experts = self.after.experts = experts
            if experts is not None:
                return True
        return self.size <= limits[-1]

    def feeds(self, seed: int, how: Variation = FIRST) -> Feeds:
        fed = {value: self.names[value] for value in (*self.before.fed, *self.after.fed)}
        return random_feeds(fed, np.random.default_rng(seed), self.rewrite, self.before.experts, how)

    def run(self, runtime: Runtime, many: Sequence[Feeds], *, wide: bool = False) -> list[tuple[Outcome, Outputs]]:
        """Returns what the matched subgraph, with dequantized weights, and the replacement give on each of many inputs.

        Where the first gives nothing, only why is told. ``wide`` has halves as float32.

        Raises:
            TargetError: the runtime cannot load the matched subgraph.
            ProofError: the runtime refuses the replacement where it runs what that replaces.
        """
        weights = dequantized(self.before, self.rewrite.jobs, self.before.experts, wide=wide)
        sides = self.before.model(weights, many), self.after.model({}, many)
        found = run_both(runtime, *(widened(*side) if wide else side for side in sides))
        return [(own, self._required(other) if own is not other else {}) for own, other in found]

    def run_replacement(self, runtime: Runtime, feeds: Feeds) -> Outputs:
        """Runs the replacement alone; one that the runtime refuses is wrong."""
        model, (own,) = self.after.model({}, [feeds])
        try:
            return runtime.run(model, own)
        except TargetError as error:
            return self._required(error)

    def _required(self, found: Outcome) -> Outputs:
        if not isinstance(found, TargetError):
            return found
        kind = UnprovedError if isinstance(found, RuntimeEndedError) else ProofError
        message = f"what is to take its place does not run: {found}"
        raise kind(self.rewrite.rule, self.rewrite.where, message) from found


@dataclass
class Verdict:
    """What came of running both sides on some inputs.

    Attributes:
        feeds: what they were fed.
        outputs: of the original and of the replacement.
        found: how far these are apart.
        rounded: the output whose halves round more than the tolerance, or None.
    """

    feeds: Feeds
    outputs: tuple[Outputs, Outputs]
    found: list[Difference]
    rounded: Difference | None = field(default=None)

    @property
    def worst(self) -> Difference:
        return max(self.found, key=lambda difference: difference.error)


def prove(
    sides: Sides,
    runtime: Runtime,
    seed: int,
    *,
    most: Sequence[int],
    several: bool = True,
    timeout: float = TIMEOUT,
) -> Proof:
    """Returns the proof of a rewrite.

    Args:
        sides: of a rewrite that is complete, and not committed.
        runtime: runs both sides, where its numbers prove something.
        seed: of the inputs.
        most: bytes of weights in float32 above which a rewrite is not run whole, if some of its experts can be; where
            it has none, it is run up to the last of these.
        several: whether other inputs are tried, where that is cheap.
        timeout: seconds that one run of the reference may take, where it judges in the runtime's place.

    Raises:
        ProofError: the replacement does not compute what the matched subgraph does.
        UnprovedError: the proof does not come to an end.
        Declined: nothing can run the matched subgraph.
    """
    rewrite = sides.rewrite
    if not sides.sample(*most):
        skipped = (
            f"not run: its weights take {sides.size} bytes in float32, more than parity.max_bytes; their bytes are read"
            " back when written"
        )
        return Proof(rewrite.rule, "none", 0.0, 0.0, rewrite.where, skipped, ran=False)
    judges, because = _judges(sides, runtime, ReferenceRuntime(timeout))
    judge, verdicts = _verdicts(sides, judges, seed, several=several and sides.size <= SEVERAL)
    _require_numbers(sides, verdicts)
    _excuse_rounding(sides, judge, verdicts)
    for verdict in verdicts:
        for difference in verdict.found:
            if not difference.holds:
                raise ProofError(rewrite.rule, rewrite.where, f"{difference} ({judge.name})")
    if several:
        require_positive(rewrite, (*sides.before.fed, *sides.after.fed), judge, sides.facts, seed)
    reasons = [_smoke_test(sides, runtime, verdicts[0].feeds, because)] if judge.name == "reference" and because else []
    rounded = next((v.rounded for v in verdicts if v.rounded is not None), None)
    if rounded is not None:
        reasons.append(f"{rounded.dtype} rounds more than {rounded.tolerance:g} on the way: held to it in float32")
    worst = max((v.worst for v in verdicts), key=lambda difference: difference.error)
    experts = None if sides.before.experts is None else len(sides.before.experts)
    why = "; ".join(reasons)
    return Proof(rewrite.rule, judge.name, worst.error, worst.tolerance, rewrite.where, because=why, experts=experts)


def _require_numbers(sides: Sides, verdicts: Sequence[Verdict]) -> None:
    """Declines where a weight is no number, or one so large that the original itself overflows.

    What has no part in a token may be multiplied by 0, or left out.
    """
    undefined = not all(np.isfinite(out).all() for v in verdicts for out in v.outputs[0].values())
    if not undefined:
        return
    for value, tensor in sides.before.constants.items():
        if not tensor.dtype.is_floating_point() or len(tensor.shape) < _MATRIX or not _is_weight(value, sides):
            continue
        array = np.abs(tensor.numpy().astype(np.float32))
        if not np.isfinite(array).all():
            raise Declined(f"weight '{value.name}' holds NaN or infinity, with which nothing can be proved", value)
        if array.max(initial=0) > _VAST:
            reason = f"weight '{value.name}' holds {array.max():.3g}, with which what it is part of overflows by itself"
            raise Declined(f"{reason}, so nothing can be proved", value)


def _is_weight(value: ir.Value, sides: Sides) -> bool:
    """Whether a constant, or a part of it, is multiplied with something, as no mask is."""

    def parts(at: ir.Value) -> list[ir.Value]:
        return [out for node in readers(at) for out in node.outputs if sides.facts.get(out, View) is not None]

    return any(node.op_type in _MULTIPLY or is_experts(node) for at in walk([value], parts) for node in readers(at))


def _judges(sides: Sides, runtime: Runtime, reference: Runtime) -> tuple[list[Runtime], str]:
    """First step: returns the runtimes that may judge, the best first, and why the given one is not the first."""
    if not sides.rewrite.nodes:
        return [reference], ""
    because = cannot_judge(sides.nodes, runtime.name, sides.rewrite.layouts)
    if not because:
        return [runtime], ""
    if cannot_run(sides.nodes, runtime.name, sides.rewrite.layouts):
        return [reference], because
    return [reference, runtime], because  # what is inexact, but the same on both sides, agrees all the same


def _verdicts(sides: Sides, judges: Sequence[Runtime], seed: int, *, several: bool) -> tuple[Runtime, list[Verdict]]:
    """Second and third step: runs both sides and compares them; declines where no judge runs the original.

    First each symbolic dimension has a size of its own. Inference gives dimensions that are always equal names of
    their own: where the original takes no such inputs, they are of one size.
    """
    others = variations((*sides.before.fed, *sides.after.fed), sides.rewrite)
    alike = [how for how in others if how.rows and not how.infinite][-1:]
    tries = [[FIRST, *others], [FIRST], alike] if several and others else [[FIRST], alike]
    refusals: dict[str, TargetError] = {}
    for judge in judges:
        for hows in tries if alike else tries[:-1]:
            drawn = [sides.feeds(seed + (how is not FIRST), how) for how in hows]
            try:
                found = sides.run(judge, drawn)
            except TargetError as refused:
                refusals.setdefault(judge.name, refused)
                continue
            ran: dict[Variation, Verdict] = {}
            for how, feeds, (own, other) in zip(hows, drawn, found, strict=True):
                if isinstance(own, TargetError):
                    refusals.setdefault(judge.name, own)
                    continue
                if how.rows == 0 and any(
                    lacks_rows(old, own[sides.names[old]], sides.before.fed) for old in sides.rewrite.outputs
                ):
                    continue
                given = other if how is FIRST else _undefined_alike(sides, own, other)
                ran[how] = Verdict(feeds, (own, given), differences(sides.rewrite, sides.names, own, given))
            if not ran.keys().isdisjoint((FIRST, *alike)):
                return judge, list(ran.values())
    message = f"what it replaces cannot be run, so nothing can be proved: {'; '.join(map(str, refusals.values()))}"
    if any(isinstance(refused, RuntimeEndedError) for refused in refusals.values()):
        raise UnprovedError(sides.rewrite.rule, sides.rewrite.where, message)
    raise Declined(message, sides.rewrite.root)


def _undefined_alike(sides: Sides, expected: Outputs, actual: Outputs) -> Outputs:
    """The replacement's outputs without what the original says nothing of: it may compute anything there."""
    found = dict(actual)
    for old, new in sides.rewrite.outputs.items():
        own, other = expected[sides.names[old]], actual[sides.names[new]]
        if own.shape == other.shape and own.dtype.kind not in "biu":
            found[sides.names[new]] = np.where(np.isnan(own), own, other)
    return found


def _excuse_rounding(sides: Sides, runtime: Runtime, verdicts: Sequence[Verdict]) -> None:
    """Last step: where float16 rounds more than the tolerance, compares again in float32.

    They stay as they are where what the replacement loses in halves is its own fault: where it is farther from the
    exact numbers than the tolerance and than the original, or where the runtime has no kernel to tell.
    """
    for verdict in verdicts:
        verdict.rounded = next((d for d in verdict.found if not d.holds and d.dtype in HALVES), None)
    rounded = [verdict for verdict in verdicts if verdict.rounded is not None]
    try:
        found = sides.run(runtime, [verdict.feeds for verdict in rounded], wide=True) if rounded else []
    except TargetError:
        return
    for verdict, (exact, replaced) in zip(rounded, found, strict=True):
        if isinstance(exact, TargetError):
            continue
        expected, actual = verdict.outputs
        wide = differences(sides.rewrite, sides.names, exact, replaced)
        outputs = [(sides.names[old], sides.names[new]) for old, new in sides.rewrite.outputs.items()]
        rounding = [relative(exact[old], expected[old])[0] for old, _ in outputs]
        own = [relative(exact[old], actual[new])[0] for old, new in outputs]
        verdict.found = [
            replace(d, error=w.error, where=w.where) if mine <= max(d.tolerance, theirs) else d
            for d, w, mine, theirs in zip(verdict.found, wide, own, rounding, strict=True)
        ]


def _smoke_test(sides: Sides, runtime: Runtime, feeds: Feeds, because: str) -> str:
    """Runs a replacement whose numbers prove nothing; it must run all the same."""
    if cannot_run(sides.rewrite.nodes, runtime.name):
        return because
    outputs = sides.run_replacement(runtime, feeds)
    if not all(np.isfinite(out.astype(np.float32)).all() for out in outputs.values()):
        raise ProofError(sides.rewrite.rule, sides.rewrite.where, f"{runtime.name} computes no number")
    return f"{because}; {runtime.name} runs it"

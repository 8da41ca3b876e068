"""One proof, in four steps: who may judge, both sides run, their outputs compared, what halves round excused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter.engine.context import ModelRun
from rewriter.engine.proposal import Rewrite
from rewriter.errors import ProofError, RuntimeEndedError, TargetError, UnprovedError
from rewriter.parity.difference import Difference, differences, relative
from rewriter.parity.edges import Variation, variations
from rewriter.parity.float32 import HALVES, widened
from rewriter.parity.judge import cannot_judge, cannot_run
from rewriter.parity.runtime import TIMEOUT, ReferenceRuntime, Runtime, run_each
from rewriter.parity.subgraph import Subgraph
from rewriter.parity.subgraph_inputs import FIRST, Feeds, random_feeds, related_nodes
from rewriter.parity.weights import dequantized, experts_to_run, float_bytes
from rewriter.report import Proof
from rewriter.rule import Declined

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]

SEVERAL = 1 << 20
"""Bytes of float weights up to which a rewrite is run with several numbers of rows: beyond, loading them costs most."""


@dataclass
class Sides:
    """The two sides of a rewrite.

    Attributes:
        rewrite: what is to be proved.
        names: of the values in both sides' models.
        before: the matched nodes.
        after: what takes their place.
        size: bytes of the larger side's weights in float32.
    """

    rewrite: Rewrite
    names: dict[ir.Value, str]
    before: Subgraph
    after: Subgraph
    size: int

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
        return cls(rewrite, names, before, after, float_bytes((before, after), rewrite.jobs))

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Those of both sides."""
        return (*self.rewrite.matched, *self.rewrite.nodes)

    def require_sample(self, most: int) -> bool:
        """Runs a few experts of a stack where all hold more than ``most`` bytes; False where that cannot be done."""
        if self.size <= most:
            return True
        experts = experts_to_run((self.before, self.after), self.size, most)
        self.before.experts = self.after.experts = experts
        return experts is not None

    def feeds(self, seed: int, how: Variation = FIRST) -> Feeds:
        """Draws the inputs that both sides share."""
        fed = {value: self.names[value] for value in (*self.before.fed, *self.after.fed)}
        return random_feeds(fed, np.random.default_rng(seed), self.rewrite, self.before.experts, how)

    def original(self, many: Sequence[Feeds], *, wide: bool = False) -> tuple[onnx.ModelProto, Sequence[Feeds]]:
        """Returns the matched subgraph with dequantized weights, and what it is fed; ``wide`` has halves as float32."""
        weights = dequantized(self.before, self.rewrite.jobs, self.before.experts, wide=wide)
        model, own = self.before.model(weights, many)
        return widened(model, own) if wide else (model, own)

    def run_replacement(self, runtime: Runtime, many: Sequence[Feeds], *, wide: bool = False) -> list[Outputs]:
        """Runs the replacement where what it replaces runs; one that the runtime refuses is wrong."""
        try:
            model, own = self.after.model({}, many)
            if wide:
                model, own = widened(model, own)
            return [_or_raised(found) for found in run_each(runtime, model, own)]
        except TargetError as error:
            kind = UnprovedError if isinstance(error, RuntimeEndedError) else ProofError
            message = f"what is to take its place does not run: {error}"
            raise kind(self.rewrite.rule, self.rewrite.where, message) from error

    def compared(self, expected: Outputs, actual: Outputs) -> list[Difference]:
        """Returns how far the outputs are apart."""
        return differences(self.rewrite, self.names, expected, actual)


@dataclass
class Verdict:
    """What came of running both sides on some inputs.

    Attributes:
        runtime: what ran them.
        feeds: what they were fed.
        outputs: of the original and of the replacement.
        found: how far these are apart.
        rounded: the output whose halves round more than the tolerance, or None.
    """

    runtime: Runtime
    feeds: Feeds
    outputs: tuple[Outputs, Outputs]
    found: list[Difference]
    rounded: Difference | None = field(default=None)

    @property
    def worst(self) -> Difference:
        """The largest difference."""
        return max(self.found, key=lambda difference: difference.error)


def prove(
    rewrite: Rewrite,
    run: ModelRun,
    runtime: Runtime,
    seed: int,
    *,
    most: int,
    several: bool = True,
    timeout: float = TIMEOUT,
) -> Proof:
    """Returns the proof of a rewrite.

    Args:
        rewrite: complete, and not committed.
        run: its facts.
        runtime: runs both sides, where its numbers prove something.
        seed: of the inputs.
        most: bytes of weights in float32 above which a rewrite is not run whole.
        several: whether other inputs are tried, where that is cheap.
        timeout: seconds that one run of the reference may take, where it judges in the runtime's place.

    Raises:
        ProofError: the replacement does not compute what the matched subgraph does.
        UnprovedError: the proof does not come to an end.
        Declined: nothing can run the matched subgraph.
    """
    sides = Sides.of(rewrite, run)
    if not sides.require_sample(most):
        skipped = (
            f"not run: its weights take {sides.size} bytes in float32, more than parity.max_bytes; their bytes are read"
            " back when written"
        )
        return Proof(rewrite.rule, "none", 0.0, 0.0, rewrite.where, skipped, ran=False)
    judges, because = _judges(sides, runtime, ReferenceRuntime(timeout))
    verdicts = [_first_verdict(sides, judges, seed)]
    judge = verdicts[0].runtime
    if several and sides.size <= SEVERAL:
        verdicts += _run_more(sides, judge, seed)
    for verdict in verdicts:
        _excuse_rounding(sides, verdict)
        for difference in verdict.found:
            if not difference.holds:
                raise ProofError(rewrite.rule, rewrite.where, f"{difference} ({judge.name})")
    reasons = [_smoked(sides, runtime, verdicts[0].feeds, because)] if judge.name == "reference" and because else []
    rounded = next((v.rounded for v in verdicts if v.rounded is not None), None)
    if rounded is not None:
        reasons.append(f"{rounded.dtype} rounds more than {rounded.tolerance:g} on the way: held to it in float32")
    worst = max((v.worst for v in verdicts), key=lambda difference: difference.error)
    experts = None if sides.before.experts is None else len(sides.before.experts)
    why = "; ".join(reasons)
    return Proof(rewrite.rule, judge.name, worst.error, worst.tolerance, rewrite.where, because=why, experts=experts)


def _judges(sides: Sides, runtime: Runtime, reference: Runtime) -> tuple[list[Runtime], str]:
    """First step: returns who may judge, the best first, and why the runtime is not the best."""
    if not sides.rewrite.nodes:
        return [reference], ""
    because = cannot_judge(sides.nodes, runtime.name, sides.rewrite.layouts)
    if not because:
        return [runtime], ""
    if cannot_run(sides.nodes, runtime.name, sides.rewrite.layouts):
        return [reference], because
    return [reference, runtime], because  # what is inexact, but the same on both sides, agrees all the same


def _run(sides: Sides, judges: Sequence[Runtime], feeds: Feeds) -> Verdict:
    """Second and third step: runs both sides and compares them; declines where no judge runs the original."""
    model, (own,) = sides.original([feeds])
    runtime, expected = _first_to_run(judges, model, own, sides.rewrite)
    (actual,) = sides.run_replacement(runtime, [feeds])
    return Verdict(runtime, feeds, (expected, actual), sides.compared(expected, actual))


def _first_verdict(sides: Sides, judges: Sequence[Runtime], seed: int) -> Verdict:
    """Runs both sides, each symbolic dimension of its own size; of one size where the original takes no such inputs.

    Inference gives dimensions that are always equal names of their own.
    """
    try:
        return _run(sides, judges, sides.feeds(seed))
    except Declined:
        others = variations((*sides.before.fed, *sides.after.fed), sides.rewrite)
        for how in [how for how in others if how.rows and not how.infinite][-1:]:
            with contextlib.suppress(Declined):
                return _run(sides, judges, sides.feeds(seed, how))
        raise


def _run_more(sides: Sides, judge: Runtime, seed: int) -> Iterator[Verdict]:
    """Runs both sides on other inputs, as far as the original takes them and they give numbers."""
    drawn = [sides.feeds(seed + 1, how) for how in variations((*sides.before.fed, *sides.after.fed), sides.rewrite)]
    try:
        found = run_each(judge, *sides.original(drawn))
    except TargetError:  # it loads with the sizes of the first inputs only
        return
    ran = [(feeds, out) for feeds, out in zip(drawn, found, strict=True) if not isinstance(out, TargetError)]
    results = sides.run_replacement(judge, [feeds for feeds, _ in ran]) if ran else []
    for (feeds, expected), actual in zip(ran, results, strict=True):
        both = expected, _undefined_alike(sides, expected, actual)
        yield Verdict(judge, feeds, both, sides.compared(*both))


def _undefined_alike(sides: Sides, expected: Outputs, actual: Outputs) -> Outputs:
    """The replacement's outputs without what the original says nothing of: it may compute anything there."""
    found = dict(actual)
    for old, new in sides.rewrite.outputs.items():
        own, other = expected[sides.names[old]], actual[sides.names[new]]
        if own.shape == other.shape and own.dtype.kind not in "biu":
            found[sides.names[new]] = np.where(np.isnan(own), own, other)
    return found


def _or_raised(found: Outputs | TargetError) -> Outputs:
    if isinstance(found, TargetError):
        raise found
    return found


def _excuse_rounding(sides: Sides, verdict: Verdict) -> None:
    """Last step: where halves round more than the tolerance, holds the differences in float32 to it.

    They stay as they are where what the replacement loses in halves is its own fault: where it is farther from the
    exact numbers than the tolerance and than the original, or where the runtime has no kernel to tell.
    """
    verdict.rounded = next((d for d in verdict.found if not d.holds and d.dtype in HALVES), None)
    if verdict.rounded is None:
        return
    runtime, rewrite = verdict.runtime, sides.rewrite
    expected, actual = verdict.outputs
    try:
        model, (fed,) = sides.original([verdict.feeds], wide=True)
        exact = runtime.run(model, fed)
    except TargetError:
        return
    (replaced,) = sides.run_replacement(runtime, [verdict.feeds], wide=True)
    wide = sides.compared(exact, replaced)
    rounding = [relative(exact[sides.names[old]], expected[sides.names[old]])[0] for old in rewrite.outputs]
    own = [difference.error for difference in sides.compared(exact, actual)]
    verdict.found = [
        replace(d, error=w.error, where=w.where) if mine <= max(d.tolerance, theirs) else d
        for d, w, mine, theirs in zip(verdict.found, wide, own, rounding, strict=True)
    ]


def _smoked(sides: Sides, runtime: Runtime, feeds: Feeds, because: str) -> str:
    """Runs a replacement whose numbers prove nothing; it must run all the same."""
    if cannot_run(sides.rewrite.nodes, runtime.name):
        return because
    (outputs,) = sides.run_replacement(runtime, [feeds])
    if not all(np.isfinite(out.astype(np.float32)).all() for out in outputs.values()):
        raise ProofError(sides.rewrite.rule, sides.rewrite.where, f"{runtime.name} computes no number")
    return f"{because}; {runtime.name} runs it"


def _first_to_run(
    judges: Sequence[Runtime], model: onnx.ModelProto, feeds: Feeds, rewrite: Rewrite
) -> tuple[Runtime, Outputs]:
    """Returns the first runtime that runs the model, and what it computes; declines where none does."""
    refusals: list[TargetError] = []
    for judge in judges:
        try:
            return judge, judge.run(model, feeds)
        except TargetError as refused:
            refusals.append(refused)
    message = f"what it replaces cannot be run, so nothing can be proved: {'; '.join(map(str, refusals))}"
    if any(isinstance(refused, RuntimeEndedError) for refused in refusals):
        raise UnprovedError(rewrite.rule, rewrite.where, message)
    raise Declined(message, rewrite.root)

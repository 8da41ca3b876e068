"""Is a rewrite right? The matched subgraph with dequantized weights, and its replacement, on the same random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter.engine.context import ModelRun
from rewriter.engine.proposal import Rewrite
from rewriter.errors import ProofError, TargetError
from rewriter.operators.qmoe import LAYOUT_KEY
from rewriter.parity.float32 import HALVES, widened
from rewriter.parity.judge import cannot_judge, cannot_run
from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime, Runtime, available
from rewriter.parity.subgraph import Subgraph
from rewriter.parity.subgraph_inputs import Feeds, random_feeds, related_nodes
from rewriter.parity.weights import BUDGET, dequantized, experts_to_run, float_bytes
from rewriter.report import Proof
from rewriter.rule import Declined

Array = npt.NDArray[Any]

TOLERANCE = {ir.DataType.FLOAT16.numpy(): 1e-3, ir.DataType.BFLOAT16.numpy(): 8e-3}
"""Largest error over the largest expected magnitude; 1e-5 for every other type. Half types round their outputs."""


class LocalProver:
    """Proves rewrites before they are committed: one of each structural class, or all."""

    def __init__(self, level: Literal["class", "all", "none"], seed: int, runtime: Runtime | None = None) -> None:
        """Prepares a prover.

        Args:
            level: ``class`` runs one rewrite of each structural class, ``all`` every one, ``none`` none.
            seed: of the random inputs.
            runtime: runs both sides; by default ONNX Runtime's CPU provider, or the reference where it is missing.
        """
        self._level = level
        self._seed = seed
        self._runtime = runtime or default_runtime()
        self._reference = ReferenceRuntime()
        self._proved: dict[object, Proof] = {}
        self._failed: dict[object, ProofError] = {}

    def __call__(self, rewrite: Rewrite, run: ModelRun) -> Proof | None:
        """Returns the proof of ``rewrite``.

        Raises:
            ProofError: the replacement does not compute what the matched subgraph does.
        """
        if self._level == "none":
            return None
        signature = _signature(rewrite)
        if self._level == "class" and signature in self._proved:
            return self._proved[signature]
        if signature in self._failed:
            failed = self._failed[signature]
            raise ProofError(rewrite.rule, rewrite.where, f"as at node {failed.node}, {failed.message}")
        try:
            proof = self._prove(rewrite, run)
        except ProofError as error:
            self._failed[signature] = error
            raise
        self._proved[signature] = proof
        return proof

    def _prove(self, rewrite: Rewrite, run: ModelRun) -> Proof:
        node = rewrite.where
        jobs = rewrite.jobs
        names: dict[ir.Value, str] = {}
        imports = {**rewrite.imports, **rewrite.opsets}
        related = related_nodes(rewrite)
        before = Subgraph(
            names, list(rewrite.outputs), {*rewrite.matched, *related}, run.facts, imports, layouts=rewrite.layouts
        )
        kept = {node for node in rewrite.matched if rewrite.outputs.keys().isdisjoint(node.outputs)}
        inside = {*rewrite.nodes, *related, *kept}
        after = Subgraph(names, list(rewrite.outputs.values()), inside, run.facts, imports, rewrite.outputs)
        size = float_bytes((before, after), jobs)
        experts = experts_to_run((before, after), size) if size > BUDGET else None
        if size > BUDGET and experts is None:
            skipped = f"not run: its weights take {size} bytes in float32; their bytes are read back when written"
            return Proof(rewrite.rule, "none", 0.0, 0.0, node, skipped)
        before.experts = after.experts = experts
        runtime = self._runtime if rewrite.nodes else self._reference
        nodes = (*rewrite.matched, *rewrite.nodes)
        because = cannot_judge(nodes, runtime.name, rewrite.layouts)
        fed = {value: names[value] for value in (*before.fed, *after.fed)}
        feeds = random_feeds(fed, np.random.default_rng(self._seed), rewrite, experts)
        judges = [self._reference, runtime] if because else [runtime]
        if because and cannot_run(nodes, runtime.name, rewrite.layouts):
            judges.pop()  # what is inexact may judge where nothing else runs, but not what runs wrongly
        model, own = before.model(dequantized(before, jobs, experts), feeds)
        runtime, expected = _first_to_run(judges, model, own, rewrite.root)
        del model, own  # they hold the dequantized weights: not twice the memory for the other side
        if runtime != self._reference:
            because = ""  # what is inexact, but the same on both sides, agrees all the same
        actual = _run_replacement(rewrite, runtime, after, feeds)
        found = _differences(rewrite, names, expected, actual)
        rounded = next((d for d in found if not d.holds and d.dtype in HALVES), None)
        if rounded is not None:
            original = before.model(dequantized(before, jobs, experts), feeds)
            found = _without_rounding(rewrite, names, runtime, original, (after, feeds), found, (expected, actual))
        for difference in found:
            if not difference.holds:
                raise ProofError(rewrite.rule, node, f"{difference} ({runtime.name})")
        if because and not cannot_run(rewrite.nodes, self._runtime.name):
            because += self._smoke(rewrite, after, feeds)
        if rounded is not None:
            rounds = f"{rounded.dtype} rounds more than {rounded.tolerance:g} on the way: held to it in float32"
            because = "; ".join(filter(None, (because, rounds)))
        worst = max(found, key=lambda d: d.error)
        return Proof(rewrite.rule, runtime.name, worst.error, worst.tolerance, node, because=because, experts=experts)

    def _smoke(self, rewrite: Rewrite, after: Subgraph, feeds: Feeds) -> str:
        """Runs a replacement whose numbers prove nothing; it must run all the same."""
        outputs = _run_replacement(rewrite, self._runtime, after, feeds)
        if not all(np.isfinite(out.astype(np.float32)).all() for out in outputs.values()):
            raise ProofError(rewrite.rule, rewrite.where, f"{self._runtime.name} computes no number")
        return f"; {self._runtime.name} runs it"


@dataclass(frozen=True)
class _Difference:
    """How far the two sides of a rewrite are apart in one output.

    Attributes:
        value: name of the output.
        error: largest difference over the largest expected magnitude.
        tolerance: largest error allowed.
        where: index of the largest difference.
        dtype: of the output.
    """

    value: str
    error: float
    tolerance: float
    where: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def holds(self) -> bool:
        """Whether the sides agree; NaN does not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"'{self.value}' differs by {self.error:.3g} of its largest value at {self.where}, more than"
            f" {self.tolerance:g}"
        )


def _differences(
    rewrite: Rewrite, names: Mapping[ir.Value, str], expected: Mapping[str, Array], actual: Mapping[str, Array]
) -> list[_Difference]:
    found = []
    for old, new in rewrite.outputs.items():
        own = expected[names[old]]
        error, where = _relative(own, actual[names[new]])
        found.append(_Difference(old.name or "", error, TOLERANCE.get(own.dtype, 1e-5), where, own.dtype))
    return found


def _without_rounding(
    rewrite: Rewrite,
    names: Mapping[ir.Value, str],
    runtime: Runtime,
    original: tuple[onnx.ModelProto, Feeds],
    replacement: tuple[Subgraph, Feeds],
    found: Sequence[_Difference],
    halves: tuple[Mapping[str, Array], Mapping[str, Array]],
) -> list[_Difference]:
    """Returns the differences in float32; as found, where what the replacement loses in halves is its own fault.

    That is where it is farther from the exact numbers than the tolerance and than the original, or where the runtime
    has no kernel to tell.
    """
    try:
        exact = runtime.run(*widened(*original))
    except TargetError:
        return [*found]
    wide = _differences(rewrite, names, exact, _run_replacement(rewrite, runtime, *replacement, wide=True))
    expected, actual = halves
    rounding = [_relative(exact[names[old]], expected[names[old]])[0] for old in rewrite.outputs]
    own = [d.error for d in _differences(rewrite, names, exact, actual)]
    return [
        replace(d, error=w.error, where=w.where) if mine <= max(d.tolerance, theirs) else d
        for d, w, mine, theirs in zip(found, wide, own, rounding, strict=True)
    ]


def _run_replacement(
    rewrite: Rewrite, runtime: Runtime, after: Subgraph, feeds: Feeds, *, wide: bool = False
) -> Mapping[str, Array]:
    """Runs a replacement where what it replaces runs; one that the runtime refuses is wrong."""
    try:
        model = after.model({}, feeds)
        return runtime.run(*(widened(*model) if wide else model))
    except TargetError as error:
        raise ProofError(rewrite.rule, rewrite.where, f"what is to take its place does not run: {error}") from error


def _first_to_run(
    judges: Sequence[Runtime], model: onnx.ModelProto, feeds: Feeds, root: ir.Node
) -> tuple[Runtime, Mapping[str, Array]]:
    """Returns the first runtime that runs the model, and what it computes; declines where none does."""
    refusals = []
    for judge in judges:
        try:
            return judge, judge.run(model, feeds)
        except TargetError as refused:
            refusals.append(str(refused))
    raise Declined(f"what it replaces cannot be run, so nothing can be proved: {'; '.join(refusals)}", root)


def default_runtime() -> Runtime:
    """Returns ONNX Runtime's CPU provider where it is installed, else the reference operators."""
    return OrtRuntime() if "cpu" in available() else ReferenceRuntime()


def _relative(expected: Array, actual: Array) -> tuple[float, tuple[int, ...]]:
    """Largest difference over the largest expected magnitude, and where it is; an overflow must be the same on both."""
    if expected.shape != actual.shape:
        return float("inf"), ()
    if not expected.size:
        return 0.0, ()
    wide, got = expected.astype(np.float64), actual.astype(np.float64)
    same = (wide == got) | (np.isnan(wide) & np.isnan(got))
    finite = np.isfinite(wide) & np.isfinite(got)
    if not (same | finite).all():
        return float("inf"), tuple(int(i) for i in np.argwhere(~(same | finite))[0])
    wide, got = np.where(finite, wide, 0.0), np.where(finite, got, 0.0)
    difference = np.abs(wide - got)
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(difference)), difference.shape))
    scale = float(np.abs(wide).max())
    worst = float(difference[where])
    return (worst / scale if scale else worst), where


def _signature(rewrite: Rewrite) -> object:
    """What two rewrites of one structural class have in common: rule, operators, attributes, types and shapes."""
    layouts = rewrite.layouts
    return (rewrite.rule, *(_node_signature(node, layouts.get(node)) for node in (*rewrite.matched, *rewrite.nodes)))


def _node_signature(node: ir.Node, layout: str | None) -> object:
    attributes = tuple(sorted((a.name, repr(a.value)) for a in node.attributes.values()))
    types = tuple(_type_signature(v) for v in (*node.inputs, *node.outputs))
    return (node.domain, node.op_type, attributes, layout or node.metadata_props.get(LAYOUT_KEY), types)


def _type_signature(value: ir.Value | None) -> object:
    if value is None:
        return None
    return value.dtype, None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)

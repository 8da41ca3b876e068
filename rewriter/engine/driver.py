"""The fixpoint driver: phases, sweeps, and at every candidate match -> prove -> commit -> record."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule

from rewriter.engine.blame import line_of
from rewriter.engine.commit import Committer
from rewriter.engine.context import ModelRun
from rewriter.engine.interface import interface, require_same
from rewriter.engine.proposal import Rewrite
from rewriter.engine.purity import is_checked, unchanged
from rewriter.errors import NonConvergenceError, ProofError, RewriterError, RuleError, RuleSetError
from rewriter.facts import DeclineTracer, Transfer
from rewriter.graph._onnxscript import (
    MatchFailureError,
    OpKey,
    compiled,
    replaced_outputs,
    replacement,
    root_operator,
    wrong_arity,
)
from rewriter.graph.contents import all_nodes, name_of
from rewriter.report import Application, Decline, Proof
from rewriter.rule import Replacement, Rule
from rewriter.ruleset import Phase, RuleSet

Prover = Callable[[Rewrite, ModelRun], Proof | None]
"""Proves a rewrite before it is committed; raises ProofError where it is wrong."""

_TOLD_EVERY = 256

_PLAIN = Replacement({}, ())
"""What a rule says that returns new values alone."""

_TRIED = 64
"""Nodes at which a rule is tried beforehand, to find the last that it fires on."""


class Watch(Protocol):
    """Looks on while a model is rewritten, and changes nothing."""

    def attempted(self, phase: str, rule: str, node: ir.Node, how: DeclineTracer) -> None:
        """Is told of a rule that was tried at a node and did not fire."""

    def settled(self, phase: str, run: ModelRun) -> None:
        """Is told that a phase has reached its fixpoint, while its facts are still there."""


@dataclass
class Outcome:
    """What the engine did to a model, in the order in which it happened."""

    applications: list[Application] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    sweeps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidate:
    name: str
    rule: RewriteRule
    may_begin: Callable[[ir.Node], bool]
    explains: bool
    may_be_none: bool


class Engine:
    """Rewrites one model by one rule set, in place."""

    def __init__(
        self,
        run: ModelRun,
        prove: Prover,
        progress: Callable[[str, int], None] | None = None,
        watch: Watch | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Prepares a run.

        Args:
            run: the model with its facts, roles, plan and target.
            prove: called on every rewrite before it is committed.
            progress: told the phase and the number of applications so far, as a phase begins and now and then.
            watch: looks on.
            strict: a rewrite that fails its proof ends the run; else it is declined, and the rest goes on.
        """
        self._run = run
        self._prove = prove
        self._progress = progress or (lambda phase, count: None)
        self._watch = watch
        self._strict = strict
        self._failed: dict[tuple[str, str], Decline] = {}
        self._committer = Committer(run.model)
        self._proofs: dict[Proof, int] = {}
        self.outcome = Outcome()

    def apply(self, rule_set: RuleSet) -> Outcome:
        """Runs every phase to its fixpoint.

        Raises:
            NonConvergenceError: a phase still fires after its last allowed sweep.
            RuleError: a rule broke its contract.
            ProofError: a rewrite is wrong, and the run is strict.
        """
        declared = interface(self._run.model)
        with without_cycle_collection():
            for phase in rule_set.phases:
                self._phase(phase)
                self._committer.drop_dead_constants()
                last = self.outcome.applications[-1].node if self.outcome.applications else phase.name
                tried = [bound.name for bound in phase.rules]
                require_same(declared, interface(self._run.model), tried, last)
        self.outcome.proofs = list(self._proofs)
        self.outcome.declines[:0] = self._failed.values()
        return self.outcome

    def _phase(self, phase: Phase) -> None:
        self._progress(phase.name, len(self.outcome.applications))
        table, everywhere, recognisers = self._bind(phase)
        self._run.recognise(recognisers)
        fired: list[Application] = []
        for sweep in range(1, phase.max_sweeps + 1):
            self.outcome.sweeps[phase.name] = sweep
            before, begun = fired, len(self.outcome.applications)
            declines = self._sweep(phase, sweep, table, everywhere)
            fired = self.outcome.applications[begun:]
            if not fired:
                self.outcome.declines.extend(declines)
                if self._watch is not None:
                    self._watch.settled(phase.name, self._run)
                return
        last = {one.rule: one.node for one in (*before[-20:], *fired[-20:])}  # those that undo one another fire in turn
        names = [f"{name} at {node}" for name, node in last.items()]
        raise NonConvergenceError(
            f"phase '{phase.name}' still fires after {phase.max_sweeps} sweeps: {', '.join(names[:5])};"
            " these rules undo one another, or max_sweeps is too low"
        )

    def _bind(self, phase: Phase) -> tuple[dict[OpKey, list[_Candidate]], list[_Candidate], dict[Transfer, None]]:
        """Compiles the phase's rules, by the operator at their root."""
        table: dict[OpKey, list[_Candidate]] = {}
        everywhere: list[_Candidate] = []
        recognisers: dict[Transfer, None] = {}
        for bound in phase.rules:
            for rule in bound.rules:
                own = copy.copy(rule)
                if isinstance(own, Rule):
                    own.run = self._run
                    recognisers |= dict.fromkeys(own.recognisers)
                may_begin, explains = (own.may_begin, own.explains) if isinstance(own, Rule) else (_anywhere, False)
                may_be_none = explains or not isinstance(own, Rule)
                candidate = _Candidate(bound.name, compiled(own), may_begin, explains, may_be_none)
                if wrong := wrong_arity(candidate.rule):
                    raise RuleSetError(f"rule {bound.name} can never fire: {wrong}")
                key = root_operator(candidate.rule)
                (everywhere if key is None else table.setdefault(key, [])).append(candidate)
        return table, everywhere, recognisers

    def _sweep(
        self, phase: Phase, sweep: int, table: dict[OpKey, list[_Candidate]], everywhere: Sequence[_Candidate]
    ) -> list[Decline]:
        """Tries every rule at every node once; returns what was declined."""
        fired = False
        declines: list[tuple[int, int, Decline]] = []
        tracer = DeclineTracer()
        nodes = list(all_nodes(self._run.model)) if everywhere else self._committer.listed.of(table)
        kinds = {candidate.explains for candidates in (*table.values(), everywhere) for candidate in candidates}
        for explains in sorted(kinds):
            for place, node in enumerate(() if fired else nodes):
                if node.graph is None:
                    continue
                for order, candidate in enumerate((*table.get((node.domain, node.op_type), ()), *everywhere)):
                    if candidate.explains is not explains:
                        continue
                    rewrite = self._match(candidate, node, tracer, nodes)
                    if rewrite is not None and self._commit(rewrite, phase.name, sweep, tracer):
                        fired = True
                        break
                    if tracer.failed:
                        failed = tracer.record(candidate.name, phase.name, node)
                        self._failed.setdefault((failed.rule, failed.node), failed)
                    elif tracer.reason:
                        declines.append((place, order, tracer.record(candidate.name, phase.name, node)))
                    if self._watch is not None:
                        self._watch.attempted(phase.name, candidate.name, node, tracer)
        return [decline for *_, decline in sorted(declines, key=lambda told: told[:2])]

    def _later(self, candidate: _Candidate, root: ir.Node, nodes: Sequence[ir.Node]) -> Iterator[Rewrite]:
        """Yields what a rule would make of the nodes of a sweep behind one, from the last on."""
        behind = itertools.takewhile(lambda node: node is not root, reversed(nodes))
        alike = (n for n in behind if n.graph is not None and n.op_identifier() == root.op_identifier())
        for node in itertools.islice(alike, _TRIED):
            rewrite = self._match(candidate, node, DeclineTracer(), ())
            if rewrite is not None:
                try:
                    yield rewrite
                finally:
                    rewrite.discard()

    def _match(
        self, candidate: _Candidate, node: ir.Node, tracer: DeclineTracer, nodes: Sequence[ir.Node]
    ) -> Rewrite | None:
        """Matches and builds the replacement; the model is as it was whatever comes of it."""
        tracer.clear()
        with unchanged(self._run.model, candidate.name, node):
            try:
                begins = bool(node.outputs) and candidate.may_begin(node)
            except Exception as error:
                raise _broken(candidate, node, error) from error
            if not begins and not is_checked():
                return None
            rewrite = self._matched(candidate, node, tracer, nodes)
            if not begins and (rewrite is not None or tracer.reason):
                did = f"declines: {tracer.reason}" if rewrite is None else "fires"
                raise RuleError(candidate.name, name_of(node), f"its may_begin says no, and the rule {did}")
            return rewrite

    def _matched(
        self, candidate: _Candidate, node: ir.Node, tracer: DeclineTracer, nodes: Sequence[ir.Node]
    ) -> Rewrite | None:
        self._run.tried = candidate.name
        rule = candidate.rule
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        try:
            match = rule.match(self._run.model, graph, node, check_nodes_are_removable=rule.remove_nodes, tracer=tracer)
            if not match:
                return None
            built = replacement(rule, match, may_be_none=candidate.may_be_none)
            if built is None:
                tracer.decline(match.reason, match.failure_nodes_and_values)
                return None
            new, tape = built
            block = new if isinstance(new, Replacement) else _PLAIN
            outputs = replaced_outputs(new, match) if block is _PLAIN else block.outputs
        except RewriterError:
            raise
        except Exception as error:
            raise _broken(candidate, node, error) from error
        imports = self._committer.imports(graph)
        opsets = {d: imports.get(d, 1) if version is None else version for d, version in tape.used_opsets}
        producers = [n for out in outputs if (n := out.producer()) is not None]
        matched = tuple(dict.fromkeys([*match.nodes, *producers, *block.covers]))
        return Rewrite(
            rule=candidate.name,
            graph=graph,
            root=node,
            matched=matched,
            outputs=outputs,
            nodes=tape.nodes,
            initializers=tape.initializers,
            opsets=opsets,
            imports=imports,
            fed=block.fed,
            roles=block.roles,
            layouts=block.layouts,
            later=lambda: self._later(candidate, node, nodes),
        )

    def _commit(self, rewrite: Rewrite, phase: str, sweep: int, tracer: DeclineTracer) -> bool:
        """Proves and commits; False where it cannot be proved either way, the tracer then says why."""
        where = rewrite.where
        try:
            proof = self._prove(rewrite, self._run)
            replaced = tuple([n.op_type for n in rewrite.matched])
            proved = _forms(rewrite)
            change = self._committer.commit(rewrite)
            if _forms(rewrite) != proved:
                raise RuleError(rewrite.rule, where, "what was committed is not what was proved; nothing was written")
        except MatchFailureError as declined:
            rewrite.discard()
            tracer.decline(declined.reason, declined.failure_sources)
            return False
        except ProofError as wrong:
            rewrite.discard()
            if self._strict:
                raise
            tracer.fail(f"the rewrite {wrong.verdict} and was left out: {wrong.message}", rewrite.root)
            return False
        except BaseException:
            rewrite.discard()
            raise
        self._run.follow(rewrite.root, change, rewrite.roles)
        if proof is not None:
            self._proofs.setdefault(proof, len(self._proofs))
        by = tuple([n.op_type for n in change.added])
        index = None if proof is None else self._proofs[proof]
        removed = tuple([name for n in change.removed if (name := n.name)])
        application = Application(rewrite.rule, phase, sweep, where, replaced, by, index, removed)
        self.outcome.applications.append(application)
        if len(self.outcome.applications) % _TOLD_EVERY == 0:
            self._progress(phase, len(self.outcome.applications))
        return True


def _anywhere(node: ir.Node) -> bool:
    """A rule of onnxscript's own says all that it asks in its pattern."""
    del node
    return True


def _broken(candidate: _Candidate, node: ir.Node, error: Exception) -> RuleError:
    return RuleError(candidate.name, name_of(node), f"{type(error).__name__}: {error}{line_of(error)}")


def _forms(rewrite: Rewrite) -> list[object]:
    """The operators of a replacement and their attributes, which a commit leaves as they were proved."""
    return [(node.op_identifier(), dict(node.attributes.data)) for node in rewrite.nodes]


@contextlib.contextmanager
def without_cycle_collection() -> Iterator[None]:
    """Pauses Python's cycle collector, which scans the whole graph again and again: half of a large run's time.

    What was made meanwhile counts as old afterwards, so that it is not scanned right away either.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()

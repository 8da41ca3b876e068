"""Is a rewrite right? The matched subgraph with dequantized weights, and its replacement, on the same random inputs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping

import onnx_ir as ir

from rewriter.engine.context import ModelRun
from rewriter.engine.proposal import Rewrite
from rewriter.errors import ProofError
from rewriter.operators.qmoe import LAYOUT_KEY
from rewriter.parity.proof import Sides, prove
from rewriter.parity.runtime import TIMEOUT, OrtRuntime, ReferenceRuntime, Runtime, available
from rewriter.quantize.job import quantized_once
from rewriter.report import Proof
from rewriter.rule import Declined
from rewriter.ruleset import ParitySettings

_MEMBERS = 4
"""Members of a class that are run, where they are small: the first, the last, and others by lot."""

_SMALL = 1 << 20
"""Bytes of a member's float weights, and"""

_FEW = 64
"""number of its nodes, up to which it is small."""

_SAMPLED = 16 << 20
"""Bytes of the last member's weights above which some experts of a stack are run."""

_PLAIN = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING)
"""Types of attributes whose values can be compared as they are."""


class LocalProver:
    """Proves rewrites before they are committed: one of each structural class, or all."""

    def __init__(self, settings: ParitySettings, runtime: Runtime | None = None) -> None:
        """Prepares a prover.

        Args:
            settings: which rewrites are run and how.
            runtime: runs both sides; by default ONNX Runtime's CPU provider, or the reference where it is missing.
        """
        self._settings = settings
        # To fuse nodes costs a runtime more than to run them once as they are.
        self._runtime = runtime or default_runtime(settings.timeout, optimize=False)
        self._classes: dict[object, int] = {}
        self._proved: dict[int, Proof] = {}
        self._members: dict[int, tuple[int, int]] = {}
        self._failed: dict[int, ProofError] = {}
        self._last: dict[int, str] = {}
        self._small: dict[int, bool] = {}

    def __call__(self, rewrite: Rewrite, run: ModelRun) -> Proof | None:
        """Returns the proof of ``rewrite``.

        Raises:
            ProofError: the replacement does not compute what the matched subgraph does.
            UnprovedError: the proof does not come to an end.
        """
        if self._settings.local == "none":
            return None
        own = self._class_of(rewrite)
        if own in self._failed:
            raise _told(self._failed[own], rewrite)
        known = self._proved.get(own) if self._settings.local == "class" else None
        if known is not None and not self._is_drawn(own, rewrite):
            return known
        try:
            sides = Sides.of(rewrite, run)
            proof = self._prove(sides, self._settings.max_bytes, several=known is None)
            if self._settings.local == "class" and known is None:
                self._small[own] = sides.size <= _SMALL and len(sides.nodes) <= _FEW
                self._prove_last(own, rewrite, run)
        except ProofError as error:
            self._failed[own] = error
            if error.node == rewrite.where:
                raise
            raise _told(error, rewrite) from error
        return self._proved.setdefault(own, proof) if self._settings.local == "class" else proof

    def _class_of(self, rewrite: Rewrite) -> int:
        """The number of a rewrite's structural class: a signature is as long as the rewrite, and is hashed once."""
        return self._classes.setdefault(_signature(rewrite), len(self._classes))

    def _prove_last(self, own: int, first: Rewrite, run: ModelRun) -> None:
        """Proves the last member of a class together with the first, before any of them is committed.

        A rule may be right for the first expert and wrong for others.
        """
        for last in first.later():
            if self._class_of(last) == own:
                with contextlib.suppress(Declined):
                    self._prove(Sides.of(last, run), _SAMPLED, self._settings.max_bytes, several=False)
                self._last[own] = last.where
                self._members[own] = (2, 2)
                return

    def _prove(self, sides: Sides, *most: int, several: bool) -> Proof:
        settings = self._settings
        with quantized_once(sides.rewrite.jobs):
            return prove(sides, self._runtime, settings.seed, most=most, several=several, timeout=settings.timeout)

    def _is_drawn(self, own: int, rewrite: Rewrite) -> bool:
        """Whether another member of a class is run too: later ones by lot, the second where the last is not known."""
        seen, run = self._members.get(own, (1, 1))
        if run >= _MEMBERS or (run > 1 and not self._small[own]) or rewrite.where == self._last.get(own):
            return False
        names = "".join([rewrite.where, *(job.context.weight for job in rewrite.jobs)])
        drawn = int.from_bytes(hashlib.sha256(names.encode()).digest()[:8], "little") % seen < 2
        self._members[own] = (seen + 1, run + drawn)
        return drawn


def _told(failed: ProofError, rewrite: Rewrite) -> ProofError:
    """What a proof of a member of its class says of a rewrite."""
    if failed.node == rewrite.where:
        return failed
    return type(failed)(rewrite.rule, rewrite.where, f"as at node {failed.node}, {failed.message}")


def default_runtime(timeout: float = TIMEOUT, *, optimize: bool = True) -> Runtime:
    """Returns ONNX Runtime's CPU provider where it is installed, else the reference operators."""
    return OrtRuntime(optimize=optimize, timeout=timeout) if "cpu" in available() else ReferenceRuntime(timeout)


def _signature(rewrite: Rewrite) -> object:
    """What two rewrites of one structural class have in common: rule, operators, attributes, types and shapes."""
    nodes, layouts = (*rewrite.matched, *rewrite.nodes), rewrite.layouts
    types: dict[ir.Value | None, object] = {None: None}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value not in types:
                types[value] = _type_signature(value)
    return (rewrite.rule, *[_node_signature(node, layouts.get(node), types) for node in nodes])


def _node_signature(node: ir.Node, layout: str | None, types: Mapping[ir.Value | None, object]) -> object:
    given = node.attributes.data.values()
    attributes = sorted([(a.name, a.value if a.type in _PLAIN else repr(a.value)) for a in given])
    layout = layout or node.metadata_props.get(LAYOUT_KEY)
    of = types.__getitem__
    return node.domain, node.op_type, *attributes, layout, *map(of, node.inputs), None, *map(of, node.outputs)


def _type_signature(value: ir.Value) -> object:
    dtype, shape = value.dtype, value.shape
    number = None if dtype is None else dtype.value
    return number, None if shape is None else tuple([d if type(d) is int else None for d in shape.dims])

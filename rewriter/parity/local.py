"""Is a rewrite right? The matched subgraph with dequantized weights, and its replacement, on the same random inputs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass
class Members:
    """The rewrites of one structural class: one proof stands for all, and some others are run too.

    Attributes:
        proof: that of the first.
        failed: why they are wrong, if one is.
        last: where the last is, if it was run beforehand.
        seen: how many have come.
        run: how many of them were run.
        small: whether more than two may be run.
    """

    proof: Proof | None = None
    failed: ProofError | None = None
    last: str = ""
    seen: int = 1
    run: int = 1
    small: bool = False

    def draws(self, rewrite: Rewrite) -> bool:
        """Whether one more is run too: later ones by lot, the second where the last is not known."""
        if self.run >= _MEMBERS or (self.run > 1 and not self.small) or rewrite.where == self.last:
            return False
        names = "".join([rewrite.where, *(job.context.weight for job in rewrite.jobs)])
        drawn = int.from_bytes(hashlib.sha256(names.encode()).digest()[:8], "little") % self.seen < 2
        self.seen, self.run = self.seen + 1, self.run + drawn
        return drawn


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
        self._classes: dict[object, Members] = {}

    def __call__(self, rewrite: Rewrite, run: ModelRun) -> Proof | None:
        """Returns the proof of ``rewrite``.

        Raises:
            ProofError: the replacement does not compute what the matched subgraph does.
            UnprovedError: the proof does not come to an end.
        """
        if self._settings.local == "none":
            return None
        own = self._class_of(rewrite)
        if own.failed is not None:
            raise _told(own.failed, rewrite)
        if own.proof is not None and not own.draws(rewrite):
            return own.proof
        try:
            sides = Sides.of(rewrite, run)
            proof = self._prove(sides, self._settings.max_bytes, several=own.proof is None)
            if self._settings.local == "all":
                return proof
            if own.proof is None:
                own.small = sides.size <= _SMALL and len(sides.nodes) <= _FEW
                self._prove_last(own, rewrite, run)
                own.proof = proof
        except ProofError as error:
            own.failed = error
            if error.node == rewrite.where:
                raise
            raise _told(error, rewrite) from error
        return own.proof

    def _class_of(self, rewrite: Rewrite) -> Members:
        return self._classes.setdefault(_signature(rewrite), Members())

    def _prove_last(self, own: Members, first: Rewrite, run: ModelRun) -> None:
        """Proves the last member of a class together with the first, before any of them is committed.

        A rule may be right for the first expert and wrong for others.
        """
        for last in first.later():
            if self._class_of(last) is own:
                with contextlib.suppress(Declined):
                    self._prove(Sides.of(last, run), _SAMPLED, self._settings.max_bytes, several=False)
                own.last, own.seen, own.run = last.where, 2, 2
                return

    def _prove(self, sides: Sides, *most: int, several: bool) -> Proof:
        settings = self._settings
        with quantized_once(sides.rewrite.jobs):
            return prove(sides, self._runtime, settings.seed, most=most, several=several, timeout=settings.timeout)


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
    shapes: dict[int, object] = {}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value not in types and value is not None:
                types[value] = _type_signature(value, shapes)
    return (rewrite.rule, *[_node_signature(node, layouts.get(node), types) for node in nodes])


def _node_signature(node: ir.Node, layout: str | None, types: Mapping[ir.Value | None, object]) -> object:
    given = node.attributes.data.values()
    attributes = sorted([(a.name, a.value if a.type in _PLAIN else repr(a.value)) for a in given])
    layout = layout or node.metadata_props.get(LAYOUT_KEY)
    of = types.__getitem__
    return node.domain, node.op_type, *attributes, layout, *map(of, node.inputs), None, *map(of, node.outputs)


def _type_signature(value: ir.Value, shapes: dict[int, object]) -> object:
    """The element type and the extents of a value; many values have one shape, which is read once."""
    dtype, shape = value.dtype, value.shape
    number = None if dtype is None else dtype.value
    if shape is None:
        return number, None
    if id(shape) not in shapes:
        shapes[id(shape)] = tuple([d if type(d) is int else None for d in shape.dims])
    return number, shapes[id(shape)]

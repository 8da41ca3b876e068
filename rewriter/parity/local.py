"""Is a rewrite right? The matched subgraph with dequantized weights, and its replacement, on the same random inputs."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from rewriter.engine.context import ModelRun
from rewriter.engine.proposal import Rewrite
from rewriter.errors import ProofError
from rewriter.operators.qmoe import LAYOUT_KEY
from rewriter.parity.proof import prove
from rewriter.parity.runtime import TIMEOUT, OrtRuntime, ReferenceRuntime, Runtime, available
from rewriter.report import Proof
from rewriter.ruleset import ParitySettings

_MEMBERS = 4
"""Members of a class that are run."""

_CHEAP = 1 << 20
_MORE = 16 << 20
"""Bytes of a member's float weights up to which it costs nothing to speak of, and what all larger ones may have."""


class LocalProver:
    """Proves rewrites before they are committed: one of each structural class, or all."""

    def __init__(self, settings: ParitySettings, runtime: Runtime | None = None) -> None:
        """Prepares a prover.

        Args:
            settings: which rewrites are run and how.
            runtime: runs both sides; by default ONNX Runtime's CPU provider, or the reference where it is missing.
        """
        self._settings = settings
        self._runtime = runtime or default_runtime(settings.timeout)
        self._proved: dict[object, Proof] = {}
        self._members: dict[object, tuple[int, int]] = {}
        self._failed: dict[object, ProofError] = {}
        self._left = _MORE

    def __call__(self, rewrite: Rewrite, run: ModelRun) -> Proof | None:
        """Returns the proof of ``rewrite``.

        Raises:
            ProofError: the replacement does not compute what the matched subgraph does.
            UnprovedError: the proof does not come to an end.
        """
        if self._settings.local == "none":
            return None
        signature = _signature(rewrite)
        if self._settings.local == "class" and signature in self._proved and not self._is_drawn(signature, rewrite):
            return self._proved[signature]
        if signature in self._failed:
            failed = self._failed[signature]
            raise type(failed)(rewrite.rule, rewrite.where, f"as at node {failed.node}, {failed.message}")
        try:
            proof = self._prove(rewrite, run, several=signature not in self._proved)
        except ProofError as error:
            self._failed[signature] = error
            raise
        return self._proved.setdefault(signature, proof) if self._settings.local == "class" else proof

    def _prove(self, rewrite: Rewrite, run: ModelRun, *, several: bool) -> Proof:
        settings = self._settings
        return prove(
            rewrite,
            run,
            self._runtime,
            settings.seed,
            most=settings.max_bytes,
            several=several,
            timeout=settings.timeout,
        )

    def _is_drawn(self, signature: object, rewrite: Rewrite) -> bool:
        """Whether another member of a class is run too: the second, and later ones by lot, as long as they are cheap.

        A rule may be right for the first expert and wrong for all others.
        """
        size = sum(job.weight.size * 4 for job in rewrite.jobs)
        if size > max(_CHEAP, self._left):
            return False
        seen, run = self._members.get(signature, (1, 1))
        names = "".join([rewrite.where, *(job.context.weight for job in rewrite.jobs)])
        lot = int.from_bytes(hashlib.sha256(names.encode()).digest()[:8], "little")
        drawn = run < _MEMBERS and lot % seen < 2
        self._members[signature] = (seen + 1, run + drawn)
        if drawn and size > _CHEAP:
            self._left -= size
        return drawn


def default_runtime(timeout: float = TIMEOUT) -> Runtime:
    """Returns ONNX Runtime's CPU provider where it is installed, else the reference operators."""
    return OrtRuntime(timeout=timeout) if "cpu" in available() else ReferenceRuntime(timeout)


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

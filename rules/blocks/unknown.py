"""Why a value is not known to be what an expert returns: the nearest reason, or the first operator not understood."""

from __future__ import annotations

import contextlib

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.moves import OPERATORS
from rewriter.facts.size import Integers
from rewriter.graph.declines import INLINE, Reason
from rewriter.graph.walk import GaveUp, producers, walk
from rewriter.operators.operator import DOMAIN
from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.contents import Features, Output, Tokens
from rewriter.rules.blocks.mixing import Carried, Share, Weighted
from rewriter.tensors import View

_FAR = 64
_NORMS = ("ReduceMean", "ReduceL2", "LpNormalization", "LayerNormalization", "RMSNormalization")


def why_unknown(facts: Facts, value: ir.Value, node: ir.Node) -> tuple[str, ir.Node]:
    """Returns why a value is not known to be an expert's output, and the operator at fault; ``node`` where none is.

    That is the first operator that makes something unknown of what is known; where a walk meets none, its farthest.
    """
    unknown: ir.Node | None = None
    first: ir.Node | None = None

    def before(at: ir.Value) -> list[ir.Value]:
        located = facts.get(at, Located)
        held = None if located is None else located.content
        held = held.features if isinstance(held, Carried) else held
        if isinstance(held, Features):
            return [factor.linear.x for factor in held.factors]
        followed = located is None or _is_faulty(located)
        return [v for v in producers(at) if not is_number(facts, v)] if followed else []

    with contextlib.suppress(GaveUp):  # then the farthest that was seen
        for at in walk([value], before, limit=_FAR):
            producer = at.producer()
            if producer is None:
                continue
            if reason := facts.own_reason(at):
                return reason, producer
            located = facts.get(at, Located)
            if located is None and producer.op_type in _NORMS:
                return f"a norm ({producer.op_type}) is behind each expert, which no operator has", producer
            if located is None and _adds_its_input(facts, producer):
                return "each expert adds its input to its output, which no operator does", producer
            if located is not None and isinstance(located.content, Output):
                read = located.content.gate.x.producer()
                if read is not None and (found := _reason_of(facts, read)):
                    return found, read
            if producer.op_type in OPERATORS and producers(at) and facts.get(producers(at)[0], Located) is None:
                continue  # moves what is not understood, or what is no expert's
            unknown = producer if located is None else unknown
            if first is None and located is None and all(_is_understood(facts, v) for v in producers(at)):
                first = producer
    unknown = first or unknown
    if unknown is None:
        return "what is mixed is not the output of an expert of that router", node
    if found := _reason_of(facts, unknown):
        return found, unknown
    if unknown.domain not in ("", DOMAIN):
        called = f"what a call of {unknown.domain}::{unknown.op_type} computes is not looked into"
        return Reason(called, INLINE), unknown
    return f"{unknown.op_type} does not belong to an expert as com.microsoft::MoE has it", unknown


def _adds_its_input(facts: Facts, node: ir.Node) -> bool:
    """Whether a node adds to the output of an expert what that expert reads."""
    if node.op_type != "Add":
        return False
    held = [facts.get(v, Located) for v in node.inputs]
    read = {located.content.gate.x for located in held if located is not None and isinstance(located.content, Output)}
    tokens = {located.content.x for located in held if located is not None and isinstance(located.content, Tokens)}
    return not read.isdisjoint((*tokens, *producers(node.outputs[0])))


def is_number(facts: Facts, value: ir.Value) -> bool:
    """Returns whether a value is a constant, or sizes."""
    return facts.get(value, View) is not None or facts.get(value, Integers) is not None


def _is_understood(facts: Facts, value: ir.Value) -> bool:
    located = facts.get(value, Located)
    known = value.producer() is None or is_number(facts, value)
    return known or (located is not None and not _is_faulty(located))


def _reason_of(facts: Facts, node: ir.Node) -> Reason | None:
    """Why nothing is known of one of a node's inputs."""
    return next((reason for v in node.inputs if v is not None and (reason := facts.own_reason(v))), None)


def _is_faulty(located: Located) -> bool:
    """Whether a content is known only as something that no operator computes."""
    held = located.content
    return (isinstance(held, Weighted) and held.output is None) or (isinstance(held, Share) and bool(held.mixing.fault))


def named(reason: str) -> Reason:
    """Returns a reason as one of the experts of a router that stay apart."""
    return Reason(f"the experts of this router stay apart: {reason}", getattr(reason, "remedy", ""))

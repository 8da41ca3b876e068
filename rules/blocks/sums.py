"""Where the sum of a router's experts ends: whether a value holds all of it, or a part of a longer one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.walk import producers, readers, walk
from rewriter.rules.blocks.axes import Content, Located
from rewriter.rules.blocks.contents import Output, Router, Slot
from rewriter.rules.blocks.mixing import Complete, Mixed, Weighted, unit


def whole_sum(facts: Facts, value: ir.Value) -> Located | None:
    """Returns what a value holds where it is a sum of a router's experts, and no part of a longer one."""
    located = facts.get(value, Located)
    held = None if located is None else located.content
    if located is not None and isinstance(held, Output):
        return _of_one_each(facts, value, located, held)
    if located is None or not isinstance(held, Mixed | Complete) or on_hits(located):
        return None
    return None if is_term(value, held) or _goes_on(facts, value, held) else located


def _of_one_each(facts: Facts, value: ir.Value, located: Located, held: Output) -> Located | None:
    """What each token's one expert returns, once all are there and where nothing weighs them, as a sum."""
    router, node = held.by.router if isinstance(held.by, Slot) else held.by, value.producer()
    if not isinstance(router, Router) or router.k != 1 or node is None or held.gate.share is not None:
        return None
    if any(atom.kind not in ("token", "feature") for dim in located.axes for atom in dim):
        return None

    def moved(at: ir.Value) -> list[ir.Value]:
        return [out for n in readers(at) for out in n.outputs if content_of(facts, out) == held]

    ends = [out for at in walk([value], moved, limit=None) for n in readers(at) for out in n.outputs]
    weighed = any(content_of(facts, out) not in (None, held) for out in ends)
    if weighed or any(content_of(facts, given) == held for given in node.inputs):
        return None
    return Located(Complete(Weighted(unit(router), held, value, "slot", node)), located.axes)


def _goes_on(facts: Facts, out: ir.Value, held: Mixed | Complete) -> bool:
    """Whether the sum is part of a longer one, or the same sum that was only moved."""
    producer = out.producer()
    if isinstance(held, Complete) and any(
        use.node.op_type == "Cast" and _is_end(facts, use.node) for use in out.uses()
    ):
        return True
    inputs = () if producer is None or _is_end(facts, producer) else producer.inputs
    if any(_holds(facts, value, held) for value in inputs):
        return True
    if isinstance(held, Complete):
        return False

    def sums(at: ir.Value) -> list[ir.Value]:
        return [v for node in readers(at) for v in node.outputs if isinstance(content_of(facts, v), Mixed)]

    for at in walk([out], lambda at: [v for v in sums(at) if content_of(facts, v) is held], limit=None):
        for value in sums(at):
            other = content_of(facts, value)
            if other is not held and isinstance(other, Mixed):
                return other.mixing.router == held.mixing.router
    return False


def is_term(out: ir.Value, held: Content) -> bool:
    """Whether a sum is one expert's weighted output yet."""
    producer = out.producer()
    return isinstance(held, Mixed) and not held.complete and producer is not None and producer.op_type == "Mul"


def on_hits(located: Located) -> bool:
    """Whether a content is that of the rows of one expert."""
    return any(atom.kind == "group" for dim in located.axes for atom in dim)


def end_of_sum(facts: Facts, value: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """Returns where a sum of experts is longest, or is moved to, and what reads it there and makes it nothing known."""

    def longer(at: ir.Value) -> list[ir.Value]:
        return [out for node in readers(at) for out in node.outputs if _is_sum_of(facts, out, at)][:1]

    *_, end = walk([value], longer, limit=None)
    return end, next((node for node in readers(end) if not _any_known(facts, node)), None)


def _is_sum_of(facts: Facts, value: ir.Value, part: ir.Value) -> bool:
    after, before = facts.get(value, Located), facts.get(part, Located)
    if after is None or before is None or not isinstance(after.content, Mixed | Complete):
        return False
    return router_of(after.content) == router_of(before.content)


def router_of(held: Content) -> Router | None:
    """Returns the router of a sum of experts; None for anything else."""
    if isinstance(held, Mixed):
        return held.mixing.router
    return held.weighted.mixing.router if isinstance(held, Complete) else None


def _any_known(facts: Facts, node: ir.Node) -> bool:
    return any(facts.get(out, Located) is not None for out in node.outputs)


def completes(facts: Facts, end: ir.Value, operators: Sequence[str]) -> bool:
    """Whether one of these operators ends the sum that ``end`` holds, moved or not."""
    held = facts.get(end, Located)

    def moved(at: ir.Value) -> list[ir.Value]:
        return [v for v in producers(at) if held is not None and _holds(facts, v, held.content)][:1]

    *_, first = walk([end], moved, limit=None)
    producer = first.producer()
    if held is None or producer is None:
        return False
    return producer.op_type in operators and not is_term(producer.outputs[0], held.content)


def content_of(facts: Facts, value: ir.Value | None) -> Content | None:
    """Returns what is known that a value holds, whatever its axes."""
    located = facts.get(value, Located)
    return None if located is None else located.content


def _is_end(facts: Facts, node: ir.Node) -> bool:
    """Whether a node casts a sum, computed in float32, back to the type of what it is a sum of."""
    located = facts.get(node.outputs[0], Located)
    return node.op_type == "Cast" and located is not None and isinstance(located.content, Complete)


def _holds(facts: Facts, value: ir.Value | None, held: Content) -> bool:
    located = facts.get(value, Located)
    return located is not None and located.content is held and not on_hits(located)

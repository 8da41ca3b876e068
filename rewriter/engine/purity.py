"""Whether matching left the model as it was: a fingerprint of the whole model around each match.

A rule must not edit what it looks at: a rewrite that is declined, or fails its proof, has to leave no trace. The check
costs a walk over the model for every match, so it is on in tests and in ``rewriter.testing``, and off in normal runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import onnx_ir as ir

from rewriter.errors import RuleError
from rewriter.facts import Facts, agreed
from rewriter.graph.contents import all_nodes, bodies, name_of, subgraphs
from rewriter.graph.walk import walk

Fingerprint = list[tuple[str, Any, tuple[Any, ...]]]
"""What each part of a model is: its kind, the object itself, and its state."""

_CHECKED: ContextVar[bool] = ContextVar("matches are checked for purity", default=False)
_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Checks the runs inside of the block: a rule that edits the model raises RuleError; recognisers must agree."""
    token = _CHECKED.set(True)
    try:
        with agreed():
            yield
    finally:
        _CHECKED.reset(token)


def is_checked() -> bool:
    """Whether runs are checked here."""
    return _CHECKED.get()


def require_same(kept: Facts, stated: Facts, model: ir.Model) -> None:
    """Compares facts that commits brought up to date with those that recognisers state anew.

    Raises:
        RuleError: of a value they say different things: a recogniser goes by more than what is known of its node's
            inputs, and was not asked again when that changed.
    """
    alike: dict[tuple[int, int], bool] = {}
    for node in all_nodes(model):
        for value in node.outputs:
            was, is_now = ([*facts.of(value), facts.why_not(value)] for facts in (kept, stated))
            if not _alike(was, is_now, alike):
                message = f"of '{value.name}' was kept {_shown(was)}; asked anew, recognisers say {_shown(is_now)}"
                raise RuleError("a recogniser", name_of(node), message)


def _alike(one: Any, other: Any, known: dict[tuple[int, int], bool]) -> bool:
    """Whether two facts hold the same, also where they are compared by identity."""
    pair = id(one), id(other)
    if pair not in known:
        parts, others = _parts(one), _parts(other)
        known[pair] = (
            one is other
            or one == other
            or (
                type(one) is type(other)
                and 0 < len(parts) == len(others)
                and all(_alike(a, b, known) for a, b in zip(parts, others, strict=True))
            )
        )
    return known[pair]


def _parts(fact: Any) -> list[Any]:
    if dataclasses.is_dataclass(fact):
        return [getattr(fact, f.name) for f in dataclasses.fields(fact)]
    return list(fact) if isinstance(fact, list | tuple) else []


def unchanged(model: ir.Model, rule: str, node: ir.Node) -> contextlib.AbstractContextManager[None]:
    """Returns a block in which ``rule``, tried at ``node``, must leave the model as it is.

    Raises:
        RuleError: at the end of the block; something of the model is another one. Only where matches are checked.
    """
    return _held(model, rule, node) if _CHECKED.get() else _NOTHING


@contextlib.contextmanager
def _held(model: ir.Model, rule: str, node: ir.Node) -> Iterator[None]:
    where = name_of(node)
    before = fingerprint(model)
    yield
    if found := difference(before, fingerprint(model)):
        raise RuleError(rule, where, f"it changed the model while it was matched: {found}; only a commit may")


def fingerprint(model: ir.Model) -> Fingerprint:
    """Returns the state of everything in the model but the contents of its tensors."""
    found: Fingerprint = [
        (
            "model",
            model,
            (dict(model.metadata_props), model.doc_string, model.producer_name, tuple(model.functions)),
        )
    ]
    inner = lambda body: (graph for node in body for graph in subgraphs(node))  # noqa: E731
    for body in walk(bodies(model), inner, limit=None):
        found.append(("graph", body, _body_state(body)))
        found.extend(("value", value, _value_state(value)) for value in body.inputs)
        if isinstance(body, ir.Graph):
            found.extend(("initializer", value, _value_state(value)) for value in body.initializers.values())
        for node in body:
            found.append(("node", node, _node_state(node)))
            found.extend(("value", value, _value_state(value)) for value in node.outputs)
    return found


def difference(before: Fingerprint, after: Fingerprint) -> str:
    """Returns what differs first, or nothing."""
    if before == after:
        return ""
    for (kind, part, old), (_, other, new) in zip(before, after, strict=False):
        if part is not other:
            return f"{kind} '{_label(part)}' stands where another part stood"
        for field, was, is_now in zip(_FIELDS[kind], old, new, strict=True):
            if was != is_now:
                return f"{field} of {kind} '{_label(part)}' was {_shown(was)} and is {_shown(is_now)}"
    return f"it has {len(after)} parts in the place of {len(before)}"


_VALUE = ("name", "type", "shape", "constant", "metadata", "documentation")
_FIELDS = {
    "model": ("metadata", "documentation", "producer", "functions"),
    "graph": ("inputs", "outputs", "initializers", "opset imports", "metadata", "documentation"),
    "node": ("name", "operator", "inputs", "outputs", "attributes", "metadata", "documentation"),
    "value": _VALUE,
    "initializer": _VALUE,
}


def _body_state(body: ir.Graph | ir.Function) -> tuple[Any, ...]:
    initializers = tuple(body.initializers) if isinstance(body, ir.Graph) else ()
    imports, metadata = dict(body.opset_imports), dict(body.metadata_props)
    return tuple(body.inputs), tuple(body.outputs), initializers, imports, metadata, body.doc_string


def _node_state(node: ir.Node) -> tuple[Any, ...]:
    operator = (node.domain, node.op_type, node.overload)
    attributes, metadata = dict(node.attributes), dict(node.metadata_props)
    return node.name, operator, tuple(node.inputs), tuple(node.outputs), attributes, metadata, node.doc_string


def _value_state(value: ir.Value) -> tuple[Any, ...]:
    shape = None if value.shape is None else tuple(value.shape)
    kind = None if value.type is None else repr(value.type)  # setting a value's dtype edits its type in place
    return value.name, kind, shape, value.const_value, dict(value.metadata_props), value.doc_string


def _label(part: Any) -> str:
    if isinstance(part, ir.Model):
        return part.graph.name or ""
    return name_of(part) if isinstance(part, ir.Node) else str(getattr(part, "name", None) or "")


def _shown(state: Any) -> str:
    text = " ".join(str(state).split())
    return text if len(text) <= 80 else f"{text[:80]}..."

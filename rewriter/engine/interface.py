"""What callers know of a model, and no rewrite may change: names, types and shapes of inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.errors import RuleError
from rewriter.graph.contents import bodies

Interface = tuple[tuple[str, tuple[str, ...]], ...]


def interface(model: ir.Model) -> Interface:
    """Returns the inputs and outputs of the model and of its functions, as they are declared, in order."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for body in bodies(model):
        owner = "the model's" if body is model.graph else f"the {body.name} function's"
        for what, values in (("inputs", body.inputs), ("outputs", body.outputs)):
            found.append((f"{owner} {what}", tuple(_declared(value) for value in values)))
    return tuple(found)


def require_same(before: Interface, after: Interface, rules: Sequence[str], node: str) -> None:
    """Holds a model's interface to what it was.

    Args:
        before: the interface of the given model.
        after: of the rewritten one.
        rules: what was tried since; one of them is at fault.
        node: where one of them fired last.

    Raises:
        RuleError: they differ.
    """
    for (what, old), (_, new) in zip(before, after, strict=False):
        differing = [f"{was} -> {now}" for was, now in zip(old, new, strict=False) if was != now]
        if differing or len(old) != len(new):
            listed = ", ".join(differing) or f"{len(old)} -> {len(new)}"
            raise RuleError(" or ".join(dict.fromkeys(rules)), node, f"{what} changed: {listed}; nothing was written")


def _declared(value: ir.Value) -> str:
    shape = "" if value.shape is None else str(value.shape)
    return f"'{value.name}' {value.type}{shape}"


def contradicts(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Whether no value has both shapes; an unknown extent may be any."""
    if one is None or other is None:
        return False
    pairs = list(zip(one, other, strict=False))
    return len(one) != len(other) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)

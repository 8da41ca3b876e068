"""Recognisers as functions: a family is an open table of them, each at the operators that it is about.

    routers = Family("routers")

    @routers.at("Softmax")
    def softmax(facts: Facts, node: ir.Node, x: ir.Value) -> Scores | None: ...

A recogniser is a transfer function: from what is known of a node's inputs it states what is known of its outputs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import onnx
import onnx_ir as ir

Stated = object | Mapping[ir.Value, object] | None
"""The fact about the node's first output, a fact per output, or None where there is nothing to say."""

_F = TypeVar("_F", bound=Callable[..., Stated])


@dataclass(frozen=True, eq=False)
class Transfer:
    """One function at one operator.

    Attributes:
        family: the name of its family.
        domain: the operator's.
        op_type: the operator.
        function: called with the facts, the node and its inputs.
        least: how many inputs must be there, the first ones.
        most: how many there may be.
        overrides: whether what it states goes before what another has stated of the value.
    """

    family: str
    domain: str
    op_type: str
    function: Callable[..., Stated]
    least: int
    most: float
    overrides: bool = False

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"{self.family}.{self.function.__name__}"


class Family:
    """An open table of recognisers: any module may add to it with ``at``."""

    def __init__(self, name: str) -> None:
        """Begins an empty table; messages name its recognisers after it."""
        self.name = name
        self._transfers: list[Transfer] = []

    def __iter__(self) -> Iterator[Transfer]:
        return iter(self._transfers)

    def at(self, *op_types: str, domain: str = "", overrides: bool = False) -> Callable[[_F], _F]:
        """Puts the function below into the table, at each of these operators.

        The function takes ``(facts, node, first, second, ...)``: the facts, the node, and its inputs. An input without
        a default must be there; one with a default (None) may be absent; ``*others`` takes any more. A node with other
        inputs is none that the function is asked about. It returns the fact about the node's first output, a mapping
        from outputs to facts, or None. It changes nothing, and may raise ``rewriter.rule.Declined`` where the value is
        almost what it is about: the reason is kept and reaches the report.

        Args:
            op_types: the operators.
            domain: theirs.
            overrides: whether what the function states goes before another fact of that kind that an earlier recogniser
                has stated of the value. Where none does, two that do not agree are a fault, which tests raise.

        Raises:
            TypeError: the function names another number of inputs than any node of the operator has.
        """

        def register(function: _F) -> _F:
            least, most = _arity(function)
            for op_type in op_types:
                _require_inputs(function, op_type, domain, least, most)
                self._transfers.append(Transfer(self.name, domain, op_type, function, least, most, overrides))
            return function

        return register


def _require_inputs(function: Callable[..., Any], op_type: str, domain: str, least: int, most: float) -> None:
    """Refuses a function that no node of the operator can be given to: it would silently never be asked."""
    if domain or not onnx.defs.has(op_type):
        return
    schema = onnx.defs.get_schema(op_type)
    if least > schema.max_input or most < schema.min_input:
        takes = str(schema.min_input) if schema.min_input == schema.max_input else f"at least {schema.min_input}"
        takes = takes if least <= schema.max_input else f"at most {schema.max_input}"
        given = least if least == most else f"{least} to {most}" if most < math.inf else f"{least} or more"
        raise TypeError(f"{function.__name__} names {given} inputs after facts and node, and {op_type} has {takes}")


def _arity(function: Callable[..., Any]) -> tuple[int, float]:
    """How many inputs a function needs and takes."""
    given = list(inspect.signature(function).parameters.values())[2:]
    named = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in named)
    return least, math.inf if any(p.kind is p.VAR_POSITIONAL for p in given) else len(named)

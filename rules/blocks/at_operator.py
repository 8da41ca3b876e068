"""A rule that begins at one operator and asks all else of the node: most do, and their patterns say no more."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.rule import Rule


class AtOperator(Rule):
    """A rule at one operator that reads something, whatever else it reads; ``replace`` is given the node."""

    def __init__(self, name: str, op_type: str, domain: str = "", *, remove_nodes: bool = True) -> None:
        """Begins a rule.

        Args:
            name: the rule's.
            op_type: the operator.
            domain: the operator's.
            remove_nodes: whether the node goes, where the replacement does not say which do; then it has one output.
        """
        super().__init__(name=name, remove_nodes=remove_nodes)
        self._operator = (op_type, domain)

    def pattern(self, op: Any, first: Any) -> Any:
        op_type, domain = self._operator
        return getattr(op, op_type)(first, _allow_other_inputs=True, _domain=domain, _outputs=["out"])

    def rewrite(self, op: Any, *, first: ir.Value, out: ir.Value) -> Any:
        node = out.producer()
        assert node is not None
        return self.replace(op, node)

    def replace(self, op: Any, node: ir.Node) -> Any:
        """Does as ``Rule.rewrite``, for the node."""
        raise NotImplementedError

"""Where rules may begin: the nodes of a model by operator, listed once and then brought up to date by commits."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from rewriter.engine.proposal import Change
from rewriter.engine.purity import is_checked
from rewriter.graph._onnxscript import OpKey
from rewriter.graph.contents import all_nodes, subgraphs


class ListedNodes:
    """The nodes of a model by operator, in the model's order; a sweep over few of them costs no walk over all."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._places: dict[OpKey, dict[ir.Node, int]] = {}
        self._stale: set[OpKey] | None = None
        """Operators of which nodes came; None where nothing is known."""

    def of(self, operators: Collection[OpKey]) -> list[ir.Node]:
        """Returns the nodes of some operators, functions and subgraphs included."""
        if self._stale is None or not self._stale.isdisjoint(operators):
            self._list()
        some = [self._places[operator] for operator in operators if operator in self._places]
        places = some[0] if len(some) == 1 else {node: place for part in some for node, place in part.items()}
        found = list(places) if len(some) == 1 else sorted(places, key=places.__getitem__)
        if is_checked():
            walked = [node for node in all_nodes(self._model) if (node.domain, node.op_type) in operators]
            assert found == walked, "the nodes that are listed are not those of the model"
        return found

    def follow(self, change: Change) -> None:
        """Takes note of a commit."""
        if self._stale is None:
            return
        for node in change.removed:
            self._places.get((node.domain, node.op_type), {}).pop(node, None)
        self._stale.update((node.domain, node.op_type) for node in change.added)
        if change.reordered or any(subgraphs(node) for node in (*change.removed, *change.added)):
            self._stale = None

    def _list(self) -> None:
        self._places, self._stale = {}, set()
        for place, node in enumerate(all_nodes(self._model)):
            self._places.setdefault((node.domain, node.op_type), {})[node] = place

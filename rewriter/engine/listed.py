"""Where rules may begin: the nodes of a model by operator, listed once and then brought up to date by commits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

import onnx_ir as ir

from rewriter.engine.purity import is_checked
from rewriter.graph._onnxscript import OpKey
from rewriter.graph.contents import all_nodes


class ListedNodes:
    """The nodes of a model by operator, in the model's order; a sweep over few of them costs no walk over all."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._places: defaultdict[OpKey, dict[ir.Node, int]] = defaultdict(dict)
        self._stale: set[OpKey] | None = None
        """Operators of which nodes came; None where nothing is known."""

    def of(self, operators: Collection[OpKey]) -> list[ir.Node]:
        """Returns the nodes of some operators, functions and subgraphs included."""
        if self._stale is None or not self._stale.isdisjoint(operators):
            for _ in self.walk():
                pass
        listed = [at for operator in operators for at in self._places[operator].items()]
        places = {node: place for node, place in listed if node.graph is not None}
        found = sorted(places, key=places.__getitem__)
        if is_checked():
            walked = [node for node in all_nodes(self._model) if (node.domain, node.op_type) in operators]
            assert found == walked, "the nodes that are listed are not those of the model"
        return found

    def follow(self, added: Iterable[ir.Node]) -> None:
        """Takes note of nodes that came and left the order of the others as it was; those that went tell themselves."""
        if self._stale is not None:
            self._stale.update([(node.domain, node.op_type) for node in added])

    def forget(self) -> None:
        """Takes note that nodes stand in another order, or that whole bodies came or went."""
        self._stale = None

    def walk(self) -> Iterator[ir.Node]:
        """Yields every node of the model, and lists it on the way; to be gone through whole."""
        self._places.clear()
        for place, node in enumerate(all_nodes(self._model)):
            self._places[node.domain, node.op_type][node] = place
            yield node
        self._stale = set()

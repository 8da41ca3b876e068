"""The one function that edits a model: it puts a complete replacement where the matched nodes were."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
from onnxscript.rewriter import RULE_NAME_TAG

from rewriter.engine.interface import contradicts
from rewriter.engine.listed import ListedNodes
from rewriter.engine.proposal import Change, Rewrite, feeds_itself, may_be_out_of_order
from rewriter.errors import RuleError
from rewriter.graph._onnxscript import MatchFailureError, remove
from rewriter.graph.contents import bodies, nodes_of, subgraphs
from rewriter.quantize.job import PartTensor
from rewriter.tensors import View, ViewTensor

Container = ir.Graph | ir.Function
_SMALL = 256
"""Bytes of a constant that are looked at: shapes, axes and scalars."""

_HOLDING = (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
"""Types of attributes that hold what a model holds too."""


class Committer:
    """Holds what must stay unique over a run, value and node names and shared constants, and where nodes stand."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._values: set[str] = set()
        self._node_names: set[str] = set()
        self._constants: dict[tuple[Container, object], ir.Value] = {}
        self._roots: dict[ir.Graph, Container] = {}
        self._released: dict[ir.Value, None] = {}
        self._stored: set[int] = set()
        self._nested = False
        """Whether a node may hold a body."""
        self.listed = ListedNodes(model)
        for root in bodies(model):
            self._enter(self._body(root), root)
        self._know(list(self.listed.walk()))

    def commit(self, rewrite: Rewrite) -> Change:
        """Applies the rewrite.

        Raises:
            RuleError: the replacement does not fit the model; nothing has changed then.
        """
        root = self._roots[rewrite.graph]
        elsewhere = any(old.producer() is not rewrite.root for old in rewrite.outputs)
        self._check(rewrite, root, elsewhere)
        inner = [graph for node in rewrite.nodes for graph in subgraphs(node)]
        for graph in inner:
            self._enter(graph, root)
            self._know(list(nodes_of(graph)))
        for container in (root, self._model.graph):
            for domain, version in rewrite.opsets.items():
                container.opset_imports.setdefault(domain, version)
        shared, constants = self._place_constants(rewrite, root)
        nodes = list(rewrite.nodes)
        outputs: dict[ir.Value, ir.Value] = {}
        for old, new in rewrite.outputs.items():
            outputs[old] = self._own_output(old, shared.get(new, new), nodes, rewrite.graph, set(outputs.values()))
        self._name(rewrite, nodes, outputs)
        added = [*constants, *nodes]
        self._annotate(rewrite, added)
        unordered = elsewhere or may_be_out_of_order(rewrite)  # asked while the matched nodes still have their inputs
        rewrite.graph.insert_before(rewrite.root, nodes)
        if constants:
            body = self._body(root)
            body.insert_before(body[0], constants)  # in sight of all that may share them later
        rewired: list[ir.Node] = []
        for old, new in outputs.items():
            _declare(new, old)
            rewired += [use.node for use in old.uses()]
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        removed = self._remove_dead(rewrite.matched)
        for old, new in outputs.items():
            if old.graph is not None and old.name == new.name:  # something else of its node is still read
                old.name = self._unique(self._values, f"{old.name}_replaced")
        if unordered:
            rewrite.graph.sort()
        if unordered or inner:
            self.listed.forget()
        self.listed.follow(added)
        return Change(removed, added, rewired)

    def imports(self, graph: ir.Graph) -> Mapping[str, int]:
        """Returns the opset imports that hold in ``graph``: a subgraph has none of its own."""
        return self._roots[graph].opset_imports

    def _enter(self, graph: ir.Graph, root: Container) -> None:
        """Takes note of a graph of the root: its own, or a node's body."""
        self._roots[graph] = root
        self._nested |= graph is not self._body(root)
        self._values.update(v.name for v in graph.inputs if v.name)
        self._values.update(graph.initializers)
        for value in graph.initializers.values() if graph is root else ():
            tensor = value.const_value
            if tensor is not None and not value.is_graph_input():
                key = tensor.key if isinstance(tensor, ViewTensor) else ("view", tensor)
                self._constants.setdefault((root, key), value)
        self._stored.update(id(value.const_value) for value in graph.initializers.values())

    def _know(self, nodes: Sequence[ir.Node]) -> None:
        """Takes note of what is named, of tensors that have a name, and of bodies."""
        self._values.update({name for node in nodes for value in node.outputs if (name := value.name)})
        self._node_names.update({name for node in nodes if (name := node.name)})
        for node, held in [(n, a) for n in nodes for a in n.attributes.data.values() if a.type in _HOLDING]:
            if held.type == ir.AttributeType.TENSOR:
                self._stored.add(id(held.value))
            elif node.graph is not None:
                for graph in subgraphs(node):
                    self._enter(graph, self._roots[node.graph])

    def _check(self, rewrite: Rewrite, root: Container, elsewhere: bool) -> None:
        for domain, version in rewrite.opsets.items():
            have = root.opset_imports.get(domain, version)
            if have != version:
                raise self._fault(rewrite, f"it needs opset {domain or 'ai.onnx'} {version}; the model has {have}")
        made = rewrite.initializers
        read = {value for node in rewrite.nodes for value in node.inputs}
        for old, new in rewrite.outputs.items():
            if new.producer() is None and new not in made and not new.is_initializer() and not new.is_graph_input():
                raise self._fault(rewrite, f"the replacement of '{old.name}' is defined nowhere")
            if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
                raise self._fault(rewrite, f"'{old.name}' is {old.dtype.name}, its replacement {new.dtype.name}")
            if contradicts(old.shape, new.shape):
                raise self._fault(rewrite, f"'{old.name}' is {old.shape}, its replacement {new.shape}")
            if old in read:
                raise self._fault(rewrite, f"the replacement reads '{old.name}', which it replaces")
            if _is_identity_of(old, new) and not _may_take_name(new, rewrite.graph):
                raise MatchFailureError(f"the Identity is what names '{old.name}'", rewrite.root)
        if elsewhere and feeds_itself(rewrite):
            raise self._fault(rewrite, "an input of the replacement depends on one of its outputs")

    @staticmethod
    def _fault(rewrite: Rewrite, message: str) -> RuleError:
        return RuleError(rewrite.rule, rewrite.where, message)

    @staticmethod
    def _body(root: Container) -> ir.Graph:
        return root.graph if isinstance(root, ir.Function) else root

    def _place_constants(
        self, rewrite: Rewrite, root: Container
    ) -> tuple[Mapping[ir.Value, ir.Value], Sequence[ir.Node]]:
        """Registers the new constants, each equal one once; returns those that another takes the place of.

        A function body has no initializers: for it the second result holds Constant nodes.
        """
        shared: dict[ir.Value, ir.Value] = {}
        nodes: list[ir.Node] = []
        for value in rewrite.initializers:
            tensor = value.const_value
            assert tensor is not None
            key = (root, _key(tensor))
            home = self._constants.setdefault(key, value)
            if home is value or not _is_present(home):
                home = value
                if id(tensor) in self._stored:  # a tensor has one name, and the given model knows this one by its own
                    home.const_value = tensor = ViewTensor(View.whole(tensor, value.name or ""))
                name = tensor.name = self._unique(self._values, value.name or "constant")
                if isinstance(root, ir.Graph):
                    home.name = name
                    root.register_initializer(home)
                else:
                    label = self._unique(self._node_names, name)
                    node = ir.node("Constant", [], {"value": tensor}, num_outputs=1, name=label)
                    home = node.outputs[0]
                    home.name, home.type, home.shape = name, value.type, value.shape
                    nodes.append(node)
                self._constants[key] = home
            if home is not value:
                if not _hold_the_same(value.const_value, _tensor_of(home)):
                    raise self._fault(rewrite, f"'{value.name}' would share the constant '{home.name}', which differs")
                value.replace_all_uses_with(home)
                shared[value] = home
        return shared, nodes

    def _own_output(
        self, old: ir.Value, new: ir.Value, nodes: list[ir.Node], graph: ir.Graph, taken: set[ir.Value]
    ) -> ir.Value:
        """Returns ``new``, behind an Identity where ``old`` is a graph output and ``new`` cannot have its name."""
        if not old.is_graph_output():
            return new
        if new not in taken and any(new is out for node in nodes for out in node.outputs):
            return new
        if new not in taken and _may_take_name(new, graph):
            new.name = old.name
            return new
        node = ir.node("Identity", [new])
        nodes.append(node)
        return node.outputs[0]

    def _name(self, rewrite: Rewrite, nodes: Sequence[ir.Node], outputs: Mapping[ir.Value, ir.Value]) -> None:
        """Gives the new values the names of those they replace, and every other new thing a name of its own."""
        successors = {new: old for old, new in outputs.items()}
        stem = rewrite.root.name or next(iter(outputs)).name or rewrite.root.op_type
        heir = _heir(rewrite, nodes)
        for node in nodes:
            own = rewrite.root.name if node is heir else None
            node.name = own or self._unique(self._node_names, f"{stem}_{node.op_type}")
            for out in node.outputs:
                old = successors.get(out)
                if old is not None and old.name:
                    out.name = old.name
                else:
                    out.name = self._unique(self._values, out.name or f"{node.name}_out")

    @staticmethod
    def _annotate(rewrite: Rewrite, nodes: Sequence[ir.Node]) -> None:
        documents = [n.doc_string for n in rewrite.matched if n.doc_string]
        given: dict[str, str] = {}
        for source in rewrite.matched:
            for key, text in source.metadata_props.items():
                given.setdefault(key, text)
        for node in nodes:
            for key, text in given.items():
                node.metadata_props.setdefault(key, text)
            node.metadata_props[RULE_NAME_TAG] = rewrite.rule
            if documents and not node.doc_string:
                node.doc_string = "\n".join(dict.fromkeys(documents))

    def _remove_dead(self, matched: Iterable[ir.Node]) -> list[ir.Node]:
        """Removes the matched nodes, and those that only they kept alive."""
        removed: list[ir.Node] = []
        tried = deque(matched)
        while tried:
            node = tried.popleft()
            if node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
                continue
            removed.append(node)
            unread = remove(node)
            for graph in subgraphs(node) if self._nested else ():
                self.listed.forget()
                for inner in nodes_of(graph):
                    unread += remove(inner)
            for value in unread:
                producer = value.producer()
                if producer is not None:
                    tried.append(producer)
                elif value.is_initializer():
                    self._released[value] = None
        return removed

    def drop_dead_constants(self) -> None:
        """Removes the constants that lost their last reader since the last call; asked once a phase, not a commit."""
        for value in self._released:
            graph = value.graph
            if value.uses() or value.is_graph_output() or value.is_graph_input() or graph is None:
                continue
            graph.initializers.pop(value.name or "", None)
        self._released.clear()

    @staticmethod
    def _unique(taken: set[str], wanted: str) -> str:
        name, count = wanted, 1
        while name in taken:
            name = f"{wanted}_{count}"
            count += 1
        taken.add(name)
        return name


def _declare(new: ir.Value, old: ir.Value) -> None:
    """Gives a value the type of the one that it takes the place of; an output's declaration stays as it is, whole."""
    if old.is_graph_output():
        new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
        new.metadata_props.update(old.metadata_props)
    else:
        new.type, new.shape = new.type or old.type, new.shape or old.shape


def _heir(rewrite: Rewrite, nodes: Sequence[ir.Node]) -> ir.Node | None:
    """The one new node of the root's operator, which takes over its name (a plan's globs go on matching), or None."""
    root = rewrite.root
    same = [node for node in nodes if (node.domain, node.op_type) == (root.domain, root.op_type)]
    leaves = len(same) == 1 and all(out in rewrite.outputs or not out.uses() for out in root.outputs)
    return same[0] if leaves else None


def _is_present(constant: ir.Value) -> bool:
    """Whether an initializer or the output of a Constant node is still part of the model."""
    producer = constant.producer()
    return constant.is_initializer() if producer is None else producer.graph is not None


def _key(tensor: ir.TensorProtocol) -> object:
    """Equal for equal tensors: lazy ones by what they are computed from, small ones by what they hold."""
    if isinstance(tensor, ir.Tensor) and tensor.nbytes <= _SMALL:
        return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
    return getattr(tensor, "key", None) or ("view", tensor)


def _tensor_of(constant: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output."""
    producer = constant.producer()
    return constant.const_value if producer is None else producer.attributes["value"].as_tensor()


def _hold_the_same(one: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    """Whether one constant may stand for another; asked without their keys, by which they were found."""
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not isinstance(one, PartTensor) or not isinstance(other, PartTensor):
        return isinstance(one, PartTensor) == isinstance(other, PartTensor)
    weights = [[(job.weight, job.context.spec) for job in tensor.jobs] for tensor in (one, other)]
    return one.index == other.index and weights[0] == weights[1]


def _may_take_name(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether the value's own name says nothing to anybody: no input, output or initializer, nor of another graph."""
    producer = value.producer()
    return producer is not None and producer.graph is graph and not value.is_graph_output()


def _is_identity_of(old: ir.Value, new: ir.Value) -> bool:
    producer = old.producer()
    named = old.is_graph_output() and producer is not None and producer.op_type == "Identity"
    return named and producer is not None and producer.inputs[0] is new

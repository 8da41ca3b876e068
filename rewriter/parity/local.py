"""Is a rewrite right? The matched subgraph with dequantized weights, and its replacement, on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter.errors import ParityError, TargetError
from rewriter.facts import Facts
from rewriter.layout.qmoe import LAYOUT_KEY
from rewriter.parity.feeds import Feeds, random_feeds, related_nodes
from rewriter.parity.judge import cannot_judge, cannot_run
from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime, Runtime, available
from rewriter.parity.weights import (
    BUDGET,
    dequantized,
    experts_to_run,
    fed_weights,
    first_experts,
    float_bytes,
    jobs_of,
    stacks_of,
)
from rewriter.report import Proof
from rewriter.rewrite import Rewrite
from rewriter.rule import Declined
from rewriter.run import ModelRun
from rewriter.tensors import View, ViewTensor

Array = npt.NDArray[Any]

TOLERANCE = {ir.DataType.FLOAT16.numpy(): 1e-3, ir.DataType.BFLOAT16.numpy(): 8e-3}
"""Largest error over the largest expected magnitude; 1e-5 for every other type. Half types round their outputs."""


class LocalProver:
    """Proves rewrites before they are committed: one of each structural class, or all."""

    def __init__(self, level: Literal["class", "all", "none"], seed: int, runtime: Runtime | None = None) -> None:
        """Prepares a prover.

        Args:
            level: ``class`` runs one rewrite of each structural class, ``all`` every one, ``none`` none.
            seed: of the random inputs.
            runtime: runs both sides; by default ONNX Runtime's CPU provider, or the reference where it is missing.
        """
        self._level = level
        self._seed = seed
        self._runtime = runtime or default_runtime()
        self._reference = ReferenceRuntime()
        self._proved: dict[object, Proof] = {}

    def __call__(self, rewrite: Rewrite, run: ModelRun) -> Proof | None:
        """Returns the proof of ``rewrite``.

        Raises:
            ParityError: the replacement does not compute what the matched subgraph does.
        """
        if self._level == "none":
            return None
        signature = _signature(rewrite)
        if self._level == "class" and signature in self._proved:
            return self._proved[signature]
        proof = self._prove(rewrite, run)
        self._proved[signature] = proof
        return proof

    def _prove(self, rewrite: Rewrite, run: ModelRun) -> Proof:
        node = rewrite.where
        jobs = jobs_of(rewrite)
        names: dict[ir.Value, str] = {}
        imports = {**rewrite.imports, **rewrite.opsets}
        related = related_nodes(rewrite)
        before = Subgraph(names, list(rewrite.outputs), {*rewrite.matched, *related}, run.facts, imports)
        kept = {node for node in rewrite.matched if rewrite.outputs.keys().isdisjoint(node.outputs)}
        inside = {*rewrite.nodes, *related, *kept}
        after = Subgraph(names, list(rewrite.outputs.values()), inside, run.facts, imports, rewrite.outputs)
        size = float_bytes((before, after), jobs)
        experts = experts_to_run((before, after), size) if size > BUDGET else None
        if size > BUDGET and experts is None:
            skipped = f"not run: its weights take {size} bytes in float32; their bytes are read back when written"
            return Proof(rewrite.rule, "none", 0.0, 0.0, node, skipped)
        before.experts = after.experts = experts
        runtime = self._runtime if rewrite.nodes else self._reference
        because = "" if runtime is self._reference else cannot_judge((*rewrite.matched, *rewrite.nodes), runtime.name)
        fed = {value: names[value] for value in (*before.fed, *after.fed)}
        feeds = random_feeds(fed, np.random.default_rng(self._seed), rewrite, experts)
        judges = [self._reference, runtime] if because else [runtime]
        if because and cannot_run((*rewrite.matched, *rewrite.nodes), runtime.name):
            judges.pop()  # what is inexact may judge where nothing else runs, but not what runs wrongly
        model, own = before.model(dequantized(before, jobs, experts), feeds)
        runtime, expected = _first_to_run(judges, model, own, rewrite.root)
        del model, own  # they hold the dequantized weights: not twice the memory for the other side
        if runtime is not self._reference:
            because = ""  # what is inexact, but the same on both sides, agrees all the same
        actual = _run_replacement(rewrite, runtime, after, feeds)
        worst = tolerance = 0.0
        for old, new in rewrite.outputs.items():
            tolerance = max(tolerance, TOLERANCE.get(expected[names[old]].dtype, 1e-5))
            error, where = _relative(expected[names[old]], actual[names[new]])
            if not error <= tolerance:
                raise ParityError(
                    f"rule {rewrite.rule} at node {node}: '{old.name}' differs by {error:.3g} of its largest value"
                    f" at {where} (tolerance {tolerance:g}, {runtime.name}); the rewrite is wrong, nothing was written"
                )
            worst = max(worst, error)
        if because and not cannot_run(rewrite.nodes, self._runtime.name):
            because += self._smoke(rewrite, after, feeds)
        return Proof(rewrite.rule, runtime.name, worst, tolerance, node, because=because, experts=experts)

    def _smoke(self, rewrite: Rewrite, after: Subgraph, feeds: Feeds) -> str:
        """Runs a replacement whose numbers prove nothing; it must run all the same."""
        outputs = _run_replacement(rewrite, self._runtime, after, feeds)
        if not all(np.isfinite(out.astype(np.float32)).all() for out in outputs.values()):
            raise ParityError(f"rule {rewrite.rule} at node {rewrite.where}: {self._runtime.name} computes no number")
        return f"; {self._runtime.name} runs it"


def _run_replacement(rewrite: Rewrite, runtime: Runtime, after: Subgraph, feeds: Feeds) -> Mapping[str, Array]:
    """Runs a replacement where what it replaces runs; one that the runtime refuses is wrong."""
    try:
        return runtime.run(*after.model({}, feeds))
    except TargetError as error:
        raise ParityError(f"rule {rewrite.rule} at node {rewrite.where}: {error}; nothing was written") from error


def _first_to_run(
    judges: Sequence[Runtime], model: onnx.ModelProto, feeds: Feeds, root: ir.Node
) -> tuple[Runtime, Mapping[str, Array]]:
    """Returns the first runtime that runs the model, and what it computes; declines where none does."""
    refusals = []
    for judge in judges:
        try:
            return judge, judge.run(model, feeds)
        except TargetError as refused:
            refusals.append(str(refused))
    raise Declined(f"what it replaces cannot be run, so nothing can be proved: {'; '.join(refusals)}", root)


class Subgraph:
    """The nodes that compute some values from constants and from values that can be fed.

    Attributes:
        nodes: in topological order.
        constants: leaves that are constants.
        fed: leaves that are not, in the order in which they are met.
        experts: how many experts of a stack are run, or None for all.
    """

    def __init__(
        self,
        names: dict[ir.Value, str],
        outputs: Sequence[ir.Value],
        inside: set[ir.Node],
        facts: Facts,
        imports: Mapping[str, int],
        instead: Mapping[ir.Value, ir.Value] | None = None,
    ) -> None:
        self._names = names
        self._instead = instead or {}
        self._imports = imports
        self._outputs = outputs
        self.nodes: list[ir.Node] = []
        self.constants: dict[ir.Value, ir.TensorProtocol] = {}
        self.fed: list[ir.Value] = []
        self.experts: int | None = None
        done: set[ir.Node] = set()
        stack: list[tuple[ir.Value, bool]] = [(value, False) for value in reversed(outputs)]
        while stack:
            value, expanded = stack.pop()
            value = self._instead.get(value, value)
            names.setdefault(value, f"v{len(names)}")
            producer = value.producer()
            if producer is not None and producer.op_type == "Constant" and (view := facts.get(value, View)) is not None:
                self.constants[value] = ViewTensor(view)
            elif producer is not None and (producer in inside or _is_static(value, producer, facts)):
                if producer in done:
                    continue
                if expanded or not producer.inputs:
                    done.add(producer)
                    self.nodes.append(producer)
                    continue
                stack.append((value, True))
                stack.extend((v, False) for v in producer.inputs if v is not None)
            elif value.const_value is not None and not value.is_graph_input():
                self.constants[value] = value.const_value
            elif value not in self.fed:
                self.fed.append(value)

    def model(self, replaced: Mapping[ir.Value, Array], feeds: Feeds) -> tuple[onnx.ModelProto, Feeds]:
        """Returns the subgraph as a model, and what it is fed.

        Constants are initializers, but for large weights: a model holds a copy of each, a runtime makes more of them.

        Args:
            replaced: constants with other contents.
            feeds: the inputs that both sides share.
        """
        nodes = [self._node(node) for node in self.nodes]
        by_reference = fed_weights(self)
        own = {self._names[value]: feeds[self._names[value]] for value in self.fed}
        initializers = []
        for value, array in self._arrays(replaced):
            if value in by_reference:
                own[self._names[value]] = array
            else:
                initializers.append(onnx.numpy_helper.from_array(np.asarray(array, order="C"), self._names[value]))
        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in own.items()
        ]
        outputs = [_output(self._names[v], v) for v in self._outputs]
        domains = {"": 21} | {node.domain: 1 for node in self.nodes if node.domain}
        domains |= {d: v for d, v in self._imports.items() if d in domains}
        model = onnx.helper.make_model(
            onnx.helper.make_graph(nodes, "local", inputs, outputs, initializers),
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in domains.items()],
            ir_version=10,
        )
        return model, own

    def _arrays(self, replaced: Mapping[ir.Value, Array]) -> Iterator[tuple[ir.Value, Array]]:
        stacks = set() if self.experts is None else stacks_of(self)
        for value, tensor in self.constants.items():
            if value in replaced:
                yield value, replaced[value]
            elif self.experts is not None and value in stacks:
                yield value, first_experts(tensor, self.experts)
            else:
                yield value, np.asarray(tensor.numpy())

    def _node(self, node: ir.Node) -> onnx.NodeProto:
        inputs = ["" if v is None else self._names[self._instead.get(v, v)] for v in node.inputs]
        for out in node.outputs:
            self._names.setdefault(out, f"v{len(self._names)}")
        proto = onnx.helper.make_node(node.op_type, inputs, [self._names[v] for v in node.outputs], domain=node.domain)
        proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
        for key, text in node.metadata_props.items():
            proto.metadata_props.add(key=key, value=text)
        return proto


def default_runtime() -> Runtime:
    """Returns ONNX Runtime's CPU provider where it is installed, else the reference operators."""
    return OrtRuntime() if "cpu" in available() else ReferenceRuntime()


def _is_static(value: ir.Value, producer: ir.Node, facts: Facts) -> bool:
    """Whether the value is a view of a constant, or a sequence of such views: what no feed may take the place of."""
    if facts.get(value, View) is not None:
        return True
    return producer.op_type == "SplitToSequence" and facts.get(producer.inputs[0], View) is not None


def _output(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, value.dtype.value, None)


def _relative(expected: Array, actual: Array) -> tuple[float, tuple[int, ...]]:
    """Largest difference over the largest expected magnitude, and where it is; an overflow must be the same on both."""
    if expected.shape != actual.shape:
        return float("inf"), ()
    if not expected.size:
        return 0.0, ()
    wide, got = expected.astype(np.float64), actual.astype(np.float64)
    same = (wide == got) | (np.isnan(wide) & np.isnan(got))
    finite = np.isfinite(wide) & np.isfinite(got)
    if not (same | finite).all():
        return float("inf"), tuple(int(i) for i in np.argwhere(~(same | finite))[0])
    wide, got = np.where(finite, wide, 0.0), np.where(finite, got, 0.0)
    difference = np.abs(wide - got)
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(difference)), difference.shape))
    scale = float(np.abs(wide).max())
    worst = float(difference[where])
    return (worst / scale if scale else worst), where


def _signature(rewrite: Rewrite) -> object:
    """What two rewrites of one structural class have in common: rule, operators, attributes, types and shapes."""
    return (rewrite.rule, *(_node_signature(node) for node in (*rewrite.matched, *rewrite.nodes)))


def _node_signature(node: ir.Node) -> object:
    attributes = tuple(sorted((a.name, repr(a.value)) for a in node.attributes.values()))
    types = tuple(_type_signature(v) for v in (*node.inputs, *node.outputs))
    return (node.domain, node.op_type, attributes, node.metadata_props.get(LAYOUT_KEY), types)


def _type_signature(value: ir.Value | None) -> object:
    if value is None:
        return None
    return value.dtype, None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)

"""Is a rewrite right? The matched subgraph with dequantized weights, and its replacement, on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter.commit import Rewrite
from rewriter.errors import ParityError, RewriterError
from rewriter.facts import Facts
from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime, Runtime, available
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.report import Proof
from rewriter.rule import Declined
from rewriter.run import ModelRun
from rewriter.tensors import View

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

TOLERANCE = {ir.DataType.FLOAT16.numpy(): 1e-3, ir.DataType.BFLOAT16.numpy(): 8e-3}
"""Largest error over the largest expected magnitude; 1e-5 for every other type. Half types round their outputs."""

BUDGET = 1 << 29
"""Bytes of float weights above which a class is not run: the proof must not cost the memory that streaming saves."""

_SIZES = (2, 3, 5, 7)
"""Sizes for symbolic dimensions, all different, so that two of them are not mistaken for one another."""


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
        jobs = _jobs(rewrite)
        size = sum(job.weight.size * 4 for job in jobs)
        if size > BUDGET:
            skipped = f"not run: its weights take {size} bytes in float32; their bytes are read back when written"
            return Proof(rewrite.rule, "none", 0.0, 0.0, node, skipped)
        runtime = self._runtime if rewrite.nodes else self._reference
        names: dict[ir.Value, str] = {}
        before = Subgraph(names, list(rewrite.outputs), set(rewrite.matched), run.facts)
        after = Subgraph(names, list(rewrite.outputs.values()), set(rewrite.nodes), run.facts)
        weights = _dequantized(before, jobs)
        feeds = _random_feeds(before, after, np.random.default_rng(self._seed), rewrite)
        expected = runtime.run(before.model(weights, feeds), feeds)
        actual = runtime.run(after.model({}, feeds), feeds)
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
        return Proof(rewrite.rule, runtime.name, worst, tolerance, node)


class Subgraph:
    """The nodes that compute some values from constants and from values that can be fed.

    Attributes:
        nodes: in topological order.
        constants: leaves that are constants.
        fed: leaves that are not, in the order in which they are met.
    """

    def __init__(
        self, names: dict[ir.Value, str], outputs: Sequence[ir.Value], inside: set[ir.Node], facts: Facts
    ) -> None:
        self._names = names
        self._outputs = outputs
        self.nodes: list[ir.Node] = []
        self.constants: dict[ir.Value, ir.TensorProtocol] = {}
        self.fed: list[ir.Value] = []
        done: set[ir.Node] = set()
        stack: list[tuple[ir.Value, bool]] = [(value, False) for value in reversed(outputs)]
        while stack:
            value, expanded = stack.pop()
            names.setdefault(value, f"v{len(names)}")
            producer = value.producer()
            if producer is not None and (producer in inside or facts.get(value, View) is not None):
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

    def model(self, replaced: Mapping[ir.Value, Array], feeds: Mapping[str, Array]) -> onnx.ModelProto:
        """Returns the subgraph as a model; constants are initializers, ``replaced`` ones with other contents."""
        nodes = [self._node(node) for node in self.nodes]
        initializers = [
            onnx.numpy_helper.from_array(np.asarray(replaced.get(value, tensor.numpy()), order="C"), self._names[value])
            for value, tensor in self.constants.items()
        ]
        inputs = [
            onnx.helper.make_tensor_value_info(
                self._names[v], onnx.helper.np_dtype_to_tensor_dtype(feeds[self._names[v]].dtype),
                [None] * feeds[self._names[v]].ndim,
            )
            for v in self.fed
        ]
        outputs = [_output(self._names[v], v) for v in self._outputs]
        domains = {"": 21} | {node.domain: 1 for node in self.nodes if node.domain}
        graph = next((n.graph for n in self.nodes if n.graph is not None), None)
        if graph is not None:
            domains |= {d: v for d, v in graph.opset_imports.items() if d in domains}
        return onnx.helper.make_model(
            onnx.helper.make_graph(nodes, "local", inputs, outputs, initializers),
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in domains.items()],
            ir_version=10,
        )

    def _node(self, node: ir.Node) -> onnx.NodeProto:
        inputs = ["" if v is None else self._names[v] for v in node.inputs]
        for out in node.outputs:
            self._names.setdefault(out, f"v{len(self._names)}")
        proto = onnx.helper.make_node(node.op_type, inputs, [self._names[v] for v in node.outputs], domain=node.domain)
        proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
        return proto


def default_runtime() -> Runtime:
    """Returns ONNX Runtime's CPU provider where it is installed, else the reference operators."""
    return OrtRuntime() if "cpu" in available() else ReferenceRuntime()


def _output(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, value.dtype.value, None)


def _jobs(rewrite: Rewrite) -> list[QuantizationJob]:
    found: dict[object, QuantizationJob] = {}
    for value in rewrite.initializers:
        if isinstance(value.const_value, PartTensor):
            found.update((job.key, job) for job in value.const_value.jobs)
    return list(found.values())


def _dequantized(before: Subgraph, jobs: Iterable[QuantizationJob]) -> dict[ir.Value, Array]:
    """Returns the float constants of the matched subgraph with what each job makes of its part of them."""
    result: dict[ir.Value, Array] = {}
    memory: dict[ir.Value, Array] = {}
    for job in jobs:
        value, view = _holder(before, job)
        first, _ = _span(view)
        if value not in memory:
            memory[value] = _buffer(view)
            result[value] = _window(memory[value], view, first)
        _window(memory[value], job.weight, first)[...] = job.quantize().dequantize()
    return result


def _holder(before: Subgraph, job: QuantizationJob) -> tuple[ir.Value, View]:
    """The constant of the matched subgraph that holds the job's weight, and what it shows."""
    low, high = _span(job.weight)
    for value, tensor in before.constants.items():
        view = View.whole(tensor, "")
        first, last = _span(view)
        if view.source == job.weight.source and first <= low and high <= last:
            return value, view
    raise RewriterError(f"weight '{job.context.weight}' is not among the constants of what its rule matched")


def _span(view: View) -> tuple[int, int]:
    """First and last position of the source that the view shows."""
    reach = [(d - 1) * s for d, s in zip(view.shape, view.strides, strict=True)]
    return view.offset + sum(r for r in reach if r < 0), view.offset + sum(r for r in reach if r > 0)


def _buffer(view: View) -> Array:
    first, last = _span(view)
    memory = np.zeros(last - first + 1, dtype=view.dtype.numpy())
    _window(memory, view, first)[...] = view.numpy()
    return memory


def _window(memory: Array, view: View, first: int) -> Array:
    """The view's elements in a copy of the part of its source that starts at ``first``."""
    item = memory.itemsize
    return np.lib.stride_tricks.as_strided(
        memory[view.offset - first :], view.shape, tuple(s * item for s in view.strides)
    )


def _random_feeds(before: Subgraph, after: Subgraph, generator: np.random.Generator, rewrite: Rewrite) -> Feeds:
    """Draws the inputs that both sides share; symbolic dimensions of one name have one size."""
    sizes: dict[str, int] = {}
    feeds: Feeds = {}
    for value in dict.fromkeys([*before.fed, *after.fed]):
        shape = _multiplied_shape(value, _shape(value, sizes), rewrite)
        if value.dtype is None or shape is None:
            reason = f"the type of '{value.name}' is unknown, so nothing can be proved (ONNX shape inference tells it)"
            raise Declined(reason, value)
        name = before._names[value]
        if value.dtype.is_floating_point():
            feeds[name] = generator.standard_normal(shape, dtype=np.float32).astype(value.dtype.numpy())
        else:
            feeds[name] = generator.integers(0, 2, shape).astype(value.dtype.numpy())
    return feeds


def _shape(value: ir.Value, sizes: dict[str, int]) -> tuple[int, ...] | None:
    if value.shape is None:
        return None
    shape = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            shape.append(dim)
        else:
            key = dim.value or f"{value.name}:{axis}"
            shape.append(sizes.setdefault(key, _SIZES[len(sizes) % len(_SIZES)]))
    return tuple(shape)


def _multiplied_shape(
    value: ir.Value, shape: tuple[int, ...] | None, rewrite: Rewrite
) -> tuple[int, ...] | None:
    """The shape with the last dimension that a weight which multiplies the value asks for."""
    for node in rewrite.matched:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is value and node.inputs[1] is not None:
            weight = node.inputs[1].shape
            transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
            if weight is not None and isinstance(depth := weight[-1 if transposed else -2], int):
                return (*(shape or (3, 0))[:-1], depth)
    return shape


def _relative(expected: Array, actual: Array) -> tuple[float, tuple[int, ...]]:
    """Largest difference over the largest expected magnitude, and where it is."""
    if expected.shape != actual.shape:
        return float("inf"), ()
    if not expected.size:
        return 0.0, ()
    wide, got = expected.astype(np.float64), actual.astype(np.float64)
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
    return (node.domain, node.op_type, attributes, tuple(_type_signature(v) for v in (*node.inputs, *node.outputs)))


def _type_signature(value: ir.Value | None) -> object:
    if value is None:
        return None
    return value.dtype, None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)

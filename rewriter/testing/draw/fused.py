"""One MoE or QMoE node as exporters write it, its router before it, its weights constants or nearly so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rewriter.operators.form import ExpertForm
from rewriter.operators.moe import MOE
from rewriter.operators.qmoe import LAYOUT_KEY, QMOE, ROUTER_WEIGHTS
from rewriter.testing.draw.graph import Scope, small_weight, weight
from rewriter.testing.draw.packed import Packing, stacks

EXPERT_BIASES = ("none", "zero", "real", "mixed")
"""Of fc1, fc2 and fc3: mixed are real ones in fc1 alone, and zeros."""
MIXINGS = ("none", "softmax", "sigmoid")
"""What a QMoE has in its slot for router_weights."""
MARKS = ("metadata", "attribute", "nothing")
"""What tells the layout of a QMoE's weights."""


@dataclass(frozen=True)
class FusedNode:
    """One way to write a node.

    Attributes:
        form: what it computes.
        experts: E.
        hidden: H.
        intermediate: I.
        dtype: of activations, scales and float weights.
        biases: one of ``EXPERT_BIASES``.
        packing: of the weights; None writes a MoE, and otherwise it is a QMoE.
        mixing: of a QMoE, one of ``MIXINGS``.
        mark: of a QMoE, one of ``MARKS``.
        computed: whether fc1 is computed from a constant, by movement operators.
        attributes: further attributes.
        lead: dimensions of x before H.
        flat: whether the router's output is reshaped to [T, E] where x has three dimensions.
    """

    form: ExpertForm
    experts: int
    hidden: int
    intermediate: int
    dtype: str
    biases: str = "none"
    packing: Packing | None = None
    mixing: str = "none"
    mark: str = "nothing"
    computed: bool = False
    attributes: dict[str, float] = field(default_factory=dict)
    lead: Sequence[int | str] = ("T",)
    flat: bool = True

    @property
    def projections(self) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """Index, name and (N, K) of fc1, fc2 and perhaps fc3."""
        h, i = self.hidden, self.intermediate
        yield 0, "fc1", (self.form.fused * i, h)
        yield 1, "fc2", (h, i)
        if self.form.gated:
            yield 2, "fc3", (i, h)


def write_node(scope: Scope, x: str, node: FusedNode, prefix: str) -> str:
    """Writes router and node, x [.., H] -> [.., H]; the names of its weights begin with ``prefix``."""
    router = scope.weight(f"{prefix}router", (node.hidden, node.experts), node.dtype)
    logits = scope.op("MatMul", x, router)
    if len(node.lead) > 1 and node.flat:
        logits = scope.op("Reshape", logits, scope.ints(-1, node.experts))
    operator = MOE if node.packing is None else QMOE
    slots = [x, logits, *[""] * 19]
    for index, name, size in node.projections:
        for what, value in _operands(scope, node, name, size, prefix):
            slots[getattr(operator.projections[index], what)] = value
    attributes = node.form.attributes() | node.attributes
    if node.packing is not None:
        attributes |= {"expert_weight_bits": node.packing.bits}
        attributes |= {"block_size": node.packing.block} if node.packing.block else {}
        attributes |= {} if node.mark == "nothing" else {"weights_prepacked": int(node.packing.layout != "raw")}
        if node.mixing != "none":
            slots[ROUTER_WEIGHTS] = scope.op(node.mixing.capitalize(), logits)
    shape = [*node.lead, node.hidden]
    output = scope.contrib(operator.name, *slots, dtype=node.dtype, shape=shape, **attributes)
    if node.packing is not None and node.mark == "metadata":
        scope.nodes[-1].metadata_props.add(key=LAYOUT_KEY, value=node.packing.layout)
    return output


def _operands(
    scope: Scope, node: FusedNode, name: str, size: tuple[int, int], prefix: str
) -> Iterator[tuple[str, str]]:
    """Writes what one projection reads; yields kind of slot and value."""
    full = prefix + name
    if node.packing is None:
        yield "weight", _stack(scope, node, name, size, full)
    else:
        codes, scales, zeros = stacks(full, node.experts, size, node.packing, node.dtype)
        yield "weight", scope.constant(full, codes)
        yield "scales", scope.constant(f"{full}_scales", scales)
        if zeros is not None:
            yield "zero_points", scope.constant(f"{full}_zero_points", zeros)
    if node.biases == "none":
        return
    bias = weight(f"{full}_bias", (node.experts, size[0]), node.dtype)
    real = node.biases == "real" or (node.biases == "mixed" and name == "fc1")
    yield "bias", scope.constant(f"{full}_bias", bias if real else np.zeros_like(bias))


def _stack(scope: Scope, node: FusedNode, name: str, size: tuple[int, int], full: str) -> str:
    """Writes [E, N, K]."""
    (n, k), e = size, node.experts
    array = small_weight(full, (e, n, k), node.dtype, k)
    if not node.computed or name != "fc1":
        return scope.constant(full, array)
    if node.form.fused == 1:
        return scope.op("Transpose", scope.constant(full, array.transpose(0, 2, 1)), perm=[0, 2, 1])
    halves = scope.op("Reshape", scope.constant(full, array), scope.ints(e, 2, n // 2, k))
    return scope.op("Reshape", scope.op("Transpose", halves, perm=[0, 2, 1, 3]), scope.ints(e, n, k))

"""Checks what a rule claims of the values that a block reads, as that a router's scores are positive.

A proof draws inputs that fit the claim, and so would not notice that it is false. Here the nodes that make such a value
are run on random logits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from rewriter.engine.proposal import Rewrite
from rewriter.errors import ProofError, TargetError
from rewriter.facts import Facts
from rewriter.facts.shapes import fed_shape, shape_of
from rewriter.graph.declines import INFER_SHAPES
from rewriter.graph.walk import walk
from rewriter.parity.runtime import Runtime
from rewriter.parity.subgraph import Subgraph
from rewriter.parity.subgraph_inputs import Feeds, drawn_size
from rewriter.rule import Declined, Fed

_FREE = frozenset({"MatMul", "Gemm", "Einsum", "Conv"})
"""Operators whose outputs may be any numbers, as may those of the runtime's own: what reads them is run on any."""

_SPREAD = 4
"""Standard deviation of the numbers: softmax, sigmoid and softplus are both near their ends and between them."""

_NODES = 256
"""How many nodes are run at most for one value."""


def require_positive(rewrite: Rewrite, read: Iterable[ir.Value], runtime: Runtime, facts: Facts, seed: int) -> None:
    """Checks that values which a rule says are positive are so, by running the nodes from the logits to them.

    Args:
        rewrite: whose rule says so.
        read: the values that both sides are fed.
        runtime: runs the nodes.
        facts: of the model.
        seed: of the numbers.

    Raises:
        ProofError: a number is negative.
        Declined: the nodes cannot be run, so nobody knows.
    """
    for value in dict.fromkeys(read):
        fed = rewrite.fed.get(value)
        if fed is None or not fed.positive:
            continue
        numbers = _computed(value, fed, rewrite, runtime, facts, seed)
        least = float(numbers.min(initial=0.0))
        if not least >= 0:
            message = f"the rule says that '{value.name}' is positive, and its nodes make {least:g} of random logits"
            raise ProofError(rewrite.rule, rewrite.where, message)


def _computed(
    value: ir.Value, fed: Fed, rewrite: Rewrite, runtime: Runtime, facts: Facts, seed: int
) -> np.typing.NDArray[np.float32]:
    names: dict[ir.Value, str] = {}
    side = Subgraph(names, [value], _makers(value), facts, {**rewrite.imports})
    generator, sizes, feeds = np.random.default_rng(seed), dict[str, int](), Feeds()
    for leaf in side.fed:
        shape = fed.shape if leaf is value else _shape_of(leaf, facts)
        drawn = _SPREAD * generator.standard_normal(drawn_size(shape, sizes), dtype=np.float32)
        dtype = leaf.dtype or fed.dtype
        feeds[names[leaf]] = (drawn if dtype.is_floating_point() else drawn > 0).astype(dtype.numpy())
    model, (own,) = side.model({}, [feeds])
    try:
        return runtime.run(model, own)[names[value]].astype(np.float32)
    except TargetError as error:
        raise Declined(
            f"what makes '{value.name}' cannot be run, so nobody knows whether it is positive: {error}", value
        ) from error


def _shape_of(leaf: ir.Value, facts: Facts) -> tuple[tuple[int, tuple[str, ...]], ...]:
    dims = shape_of(facts, leaf)
    if dims is None:
        raise Declined("the shape of what the scores are made of is unknown", leaf, remedy=INFER_SHAPES)
    return fed_shape(dims)


def _makers(value: ir.Value) -> set[ir.Node]:
    """The nodes before a value, as far as those whose outputs may be any numbers."""

    def before(node: ir.Node) -> list[ir.Node]:
        made = (given.producer() for given in node.inputs if given is not None)
        return [node for node in made if node is not None and not node.domain and node.op_type not in _FREE]

    last = value.producer()
    return set() if last is None else set(walk([last], before, limit=_NODES))

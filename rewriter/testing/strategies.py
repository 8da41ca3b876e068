"""Strategies that draw small readable Mixture-of-Experts graphs, for properties of rules.

Each draws an ``onnx_ir.Model`` of a few nodes, whose first input is ``x`` [T, K], and shrinks towards the plainest one:
one expert, one Gather, one MatMul, in the main graph.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from hypothesis import strategies as st

from rewriter.testing.draw.attention import attention_projections
from rewriter.testing.draw.embeddings import tied_embeddings
from rewriter.testing.draw.layers import moe_models, quantized_experts
from rewriter.testing.draw.linears import projections, quantized_projections
from rewriter.testing.draw.moe_nodes import moe_nodes
from rewriter.testing.draw.unrolled import unrolled_experts

STRATEGIES: tuple[Callable[[], st.SearchStrategy[ir.Model]], ...] = (
    projections,
    unrolled_experts,
    moe_models,
    moe_nodes,
    quantized_projections,
    quantized_experts,
    tied_embeddings,
    attention_projections,
)


def any_models() -> st.SearchStrategy[ir.Model]:
    """Draws from every strategy of this module, with its defaults: for a rule of which no more is known."""
    return st.one_of([strategy() for strategy in STRATEGIES])

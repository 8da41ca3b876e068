"""Property-based tests of rules: strategies that draw graphs, and a check that holds a rule to its promises.

``check_rule(MyRule(), unrolled_experts())`` is a whole test.
"""

from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime
from rewriter.testing.check import check_model, check_rule, describe
from rewriter.testing.draw.attention import attention_projections
from rewriter.testing.draw.embeddings import tied_embeddings
from rewriter.testing.draw.graph import Scope
from rewriter.testing.draw.layers import moe_models, quantized_experts
from rewriter.testing.draw.linears import projections, quantized_projections
from rewriter.testing.draw.moe_nodes import moe_nodes
from rewriter.testing.draw.unrolled import unrolled_experts
from rewriter.testing.near_misses import near_misses
from rewriter.testing.package import package_tests
from rewriter.testing.strategies import any_models

__all__ = [
    "OrtRuntime",
    "ReferenceRuntime",
    "Scope",
    "any_models",
    "attention_projections",
    "check_model",
    "check_rule",
    "describe",
    "moe_models",
    "moe_nodes",
    "near_misses",
    "package_tests",
    "projections",
    "quantized_experts",
    "quantized_projections",
    "tied_embeddings",
    "unrolled_experts",
]

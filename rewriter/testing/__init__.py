"""Property-based tests of rules: strategies that draw graphs, and a check that holds a rule to its promises.

``check_rule(MyRule(), unrolled_experts())`` is a whole test.
"""

from rewriter.testing.check import check_model, check_rule, describe
from rewriter.testing.strategies import moe_models, projections, unrolled_experts

__all__ = ["check_model", "check_rule", "describe", "moe_models", "projections", "unrolled_experts"]

"""Property-based tests of rules: strategies that draw graphs, and a check that holds a rule to its promises.

    from rewriter.testing import check_rule, unrolled_experts

    def test_my_rule():
        check_rule(MyRule(), unrolled_experts())
"""

from rewriter.testing.check import check_model, check_rule, describe
from rewriter.testing.strategies import moe_models, projections, unrolled_experts

__all__ = ["check_model", "check_rule", "describe", "moe_models", "projections", "unrolled_experts"]

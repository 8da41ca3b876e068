"""Contractions by themselves: shares times outputs, summed by the product."""

from __future__ import annotations

import pytest
from stated import STACKED, held, kinds

from rewriter.rules.blocks.mixing import Complete, Weighted

DENSE = f"{STACKED} p = Softmax (r)"


@pytest.mark.parametrize(
    "body",
    [
        'y = Einsum <equation = "te,eth->th"> (p, o)',
        'y = Einsum <equation = "eth,te->th"> (o, p)',
        "t = Transpose <perm = [1, 0, 2]> (o) u = Unsqueeze (p, second) m = MatMul (u, t) y = Squeeze (m, second)",
        "t = Transpose <perm = [1, 2, 0]> (o) u = Unsqueeze (p, last) m = MatMul (t, u) y = Squeeze (m, last)",
    ],
)
def test_a_sum_over_all_experts(body):
    found = held(f"{DENSE} {body}")
    assert isinstance(found, Complete) and found.weighted.over == "expert" and found.weighted.output.by == "all"
    assert kinds(f"{DENSE} {body}") == [("token",), ("feature",)]


def test_shares_that_lie_otherwise():
    found = held(f'{DENSE} q = Transpose (p) y = Einsum <equation = "et,eth->th"> (q, o)')
    assert isinstance(found, Complete)


def test_a_product_that_sums_nothing():
    found = held(f'{DENSE} y = Einsum <equation = "te,eth->eth"> (p, o)')
    assert isinstance(found, Weighted) and found.over == "expert"


@pytest.mark.parametrize("equation", ["te,eth->t", "tj,eth->teh", "te,eth->te"])
def test_other_sums_are_none(equation):
    assert held(f'{DENSE} y = Einsum <equation = "{equation}"> (p, o)') is None

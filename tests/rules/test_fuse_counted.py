"""fuse-experts on rows that are sorted, split by each expert's count, and added up where their tokens are."""

from __future__ import annotations

import pytest
from test_fuse_experts import fuse
from test_fuse_others import TOPK, block, declines, exact, operators

BINCOUNT = 'ones = Expand(n1, n) c = ScatterElements<axis=0, reduction="add">(counts, f, ones)'
HOT = """
    sh = Shape(l) zs = Expand(n0, sh) si = Shape(i) os = Expand(n1, si) hot = ScatterElements<axis=1>(zs, i, os)
    c = ReduceSum<keepdims=0>(hot, l0)
"""
LISTED = (
    HOT.replace("c = Reduce", "cs = Reduce")
    + "".join(f"k{e} = Gather(cs, n{e}) kl{e} = Reshape(k{e}, last) " for e in range(3))
    + "c = Concat<axis=0>(kl0, kl1, kl2)"
)
TOKEN = "t = Div(o, n2)"
FLOATS = """
    of = Cast<to=1>(o) tf = Div(of, two) ta = Abs(tf) td = Floor(ta) ts = Sign(tf) tm = Mul(td, ts) t = Cast<to=7>(tm)
"""


def sorted_rows(count=BINCOUNT, token=TOKEN, pieces="g0, g1, g2", seed="zero", reduction="add"):
    experts = "".join(f"h{e} = MatMul(g{e}, u{e}) a{e} = Relu(h{e}) o{e} = MatMul(a{e}, d{e}) " for e in range(3))
    return f"""
        {TOPK.format(k="l2")} f = Reshape(i, last) n = Shape(f) s, o = TopK<axis=0, largest=0>(f, n) {count} {token}
        t1 = Unsqueeze(t, l1) rows_ = GatherND(x, t1) {pieces} = Split<axis=0>(rows_, c) {experts}
        cat = Concat<axis=0>(o0, o1, o2) wf = Reshape(w, last) ws = Gather(wf, o) w1 = Unsqueeze(ws, l1)
        m = Mul(cat, w1) xs = Shape(x) z = Expand({seed}, xs) y = ScatterND<reduction="{reduction}">(z, t1, m)
    """


def counted(**how):
    return block(sorted_rows(**how), last=[-1], counts=[0, 0, 0])


@pytest.mark.parametrize("count", [BINCOUNT, HOT, LISTED])
@pytest.mark.parametrize("token", [TOKEN, FLOATS])
def test_rows_split_by_their_counts(count, token):
    """JetMoE, and loops over ``split(bincount)`` behind an argsort."""
    model = exact(counted(count=count, token=token))
    assert not {"Split", "ScatterND", "NonZero"} & operators(model).keys()


def test_near_misses():
    crossed = LISTED.replace("(kl0, kl1, kl2)", "(kl0, kl2, kl1)")
    declines(counted(count=crossed), "rows are split by counts that are not those of every expert in turn")
    declines(counted(reduction="none"), "the rows of a token's experts replace each other")
    for how in (
        {"count": BINCOUNT.replace("Expand(n1, n)", "Expand(n2, n)")},  # each row is counted twice
        {"token": "t = Mod(o, n2)"},
        {"token": FLOATS.replace("Floor", "Ceil")},
        {"pieces": "g1, g0, g2"},
        {"seed": "two"},
    ):
        result = fuse(counted(**how)).report
        assert not result.applied and result.declined, how

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


EXPERTS = "".join(f"h{e} = MatMul(g{e}, u{e}) a{e} = Relu(h{e}) o{e} = MatMul(a{e}, d{e}) " for e in range(3))
SORTED = f"""
    {TOPK.format(k="l2")} f = Reshape(i, last) n = Shape(f) s, o = TopK<axis=0, largest=0>(f, n) t = Div(o, n2)
    xs = Gather(x, t)
"""
BACK = """
    e0 = Shape({rows}) e1 = ConstantOfShape(e0) oc = Unsqueeze(o, last) back = ScatterND(e1, oc, {rows})
    b3 = Reshape(back, pairs) w3 = Unsqueeze(w, last) m = Mul(b3, w3) y = ReduceSum<keepdims=0>(m, l1)
"""
SLICES = """
    s1 = Add(c0, c1) s2 = Add(s1, c2)
    g0 = Slice(xs, l0, c0, l0) g1 = Slice(xs, c0, s1, l0) g2 = Slice(xs, s1, s2, l0)
"""
COUNTS = HOT + "c0, c1, c2 = Split(c, each) "


def masked_rows(numbers=(0, 1, 2), filled=False):
    """Rows of sorted pairs, those of each expert found by a mask; added to their tokens, or put in their places."""
    weights = "" if filled else "wf = Reshape(w, last) ws = Gather(wf, o) wc = Unsqueeze(ws, last) "
    text = SORTED + weights + f"se = Gather(f, o) zn = Shape({'xs' if filled else 'x'}) z = ConstantOfShape(zn) "
    total = "z"
    for e, number in enumerate(numbers):
        text += f"q{e} = Equal(se, n{number}) nz{e} = NonZero(q{e}) r{e} = Squeeze(nz{e}, l0) g{e} = Gather(xs, r{e}) "
        text += f"h{e} = MatMul(g{e}, u{e}) a{e} = Relu(h{e}) o{e} = MatMul(a{e}, d{e}) "
        if filled:
            text += f"rc{e} = Unsqueeze(r{e}, last) cat{e} = ScatterND({total}, rc{e}, o{e}) "
            total = f"cat{e}"
            continue
        text += f"wr{e} = Gather(wc, r{e}) m{e} = Mul(o{e}, wr{e}) tr{e} = Gather(t, r{e}) "
        text += f"tc{e} = Unsqueeze(tr{e}, last) "
        total, before = ("y" if e == 2 else f"y{e}"), total
        text += f'{total} = ScatterND<reduction="add">({before}, tc{e}, m{e}) '
    text += BACK.format(rows=total) if filled else ""
    return block(text, last=[-1], pairs=[-1, 2, 8])


@pytest.mark.parametrize("filled", [False, True])
def test_sorted_rows_that_a_mask_takes(filled):
    assert not {"NonZero", "ScatterND"} & operators(exact(masked_rows(filled=filled))).keys()


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("numbers", [(0, 1, 1), (0, 2, 3)])
def test_a_mask_off_by_one_declines(filled, numbers):
    declines(masked_rows(numbers, filled), "")


def sliced_rows(slices=SLICES, back=BACK):
    cat = "cat = Concat<axis=0>(o0, o1, o2) "
    return block(
        SORTED + COUNTS + slices + EXPERTS + cat + back.format(rows="cat"), last=[-1], each=[1, 1, 1], pairs=[-1, 2, 8]
    )


def test_rows_between_cumulated_counts_and_put_in_their_places():
    """DeepSeek's ``moe_infer``: a slice of the sorted rows for each expert, ``new[order] = rows``."""
    assert not {"Slice", "ScatterND"} & operators(exact(sliced_rows())).keys()


def test_rows_between_other_counts_decline():
    crossed = SLICES.replace("Slice(xs, c0, s1", "Slice(xs, l0, s1")
    declines(sliced_rows(crossed), "the rows of expert 1 do not begin where those of the one before end")
    for how in (
        {"slices": SLICES.replace("s2 = Add(s1, c2)", "s2 = Add(c1, c2)")},
        {"slices": SLICES.replace("Slice(xs, l0, c0, l0)", "Slice(xs, l1, c0, l0)")},
        {"back": BACK.replace("ScatterND(", 'ScatterND<reduction="add">(').replace("zero", "two")},
        {"back": BACK.replace("Unsqueeze(o, last)", "Unsqueeze(f, last)")},
    ):
        assert not fuse(sliced_rows(**how)).report.applied, how

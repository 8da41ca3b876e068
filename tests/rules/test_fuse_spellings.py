"""fuse-experts on spellings that people write by hand: the same block in other words, and words that are no block."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from test_fuse_experts import fuse
from test_fuse_others import INTER, TOPK, H, block, declines, exact, expert, operators, weighed

ROUTED = TOPK.format(k="l2")
TERMS = "".join(expert(e) for e in range(3))
SUM = "s = Add(t0, t1) y = Add(s, t2) "
DENSE = "zs = Shape(l) z = ConstantOfShape(zs) p = ScatterElements<axis=-1>(z, i, w) "
STACK = "x3 = Unsqueeze(x, l0) h = MatMul(x3, u) a = Relu(h) "


COLUMNS = "".join(f"g{e} = Gather<axis=1>(p, l{e}) t{e} = Mul(o{e}, g{e}) " for e in range(3))
HOT = ROUTED + "hot = OneHot<axis=-1>(i, n3, bits) hf = Cast<to=1>(hot) {} " + TERMS + COLUMNS + SUM

SPELLINGS = {
    "one-hot by einsum": HOT.format('p = Einsum<equation="tke,tk->te">(hf, w)'),
    "one-hot by matmul": HOT.format("w1 = Unsqueeze(w, l1) p1 = MatMul(w1, hf) p = Squeeze(p1, l1)"),
    "weight before down": ROUTED
    + DENSE
    + STACK
    + "pt = Transpose<perm=[1, 0]>(p) pc = Unsqueeze(pt, last) aw = Mul(a, pc) o = MatMul(aw, d) "
    + "y = ReduceSum<keepdims=0>(o, l0)",
    "first slots of a larger TopK": "l = MatMul(x, r) v3, i3 = TopK<axis=-1>(l, l3) v = Slice(v3, l0, l2, l1) "
    + "i = Slice(i3, l0, l2, l1) w = Softmax<axis=-1>(v) "
    + TERMS
    + "".join(weighed(e, f"o{e}") for e in range(3))
    + SUM,
    "einsum of three": ROUTED + DENSE + STACK + 'y = Einsum<equation="eti,eih,te->th">(a, d, p)',
    "einsum of three, the chosen": ROUTED
    + 'wu = Gather(u, i) wd = Gather(d, i) h = Einsum<equation="th,tkhi->tki">(x, wu) a = Relu(h) '
    + 'y = Einsum<equation="tk,tkih,tki->th">(w, wd, a)',
    "take_along_dim": ROUTED
    + TERMS
    + "".join(f"z{e} = Unsqueeze(o{e}, l1) " for e in range(3))
    + "z = Concat<axis=1>(z0, z1, z2) i1 = Unsqueeze(i, last) xs = Shape(x) hs = Slice(xs, l1, l2) is = Shape(i) "
    + "to = Concat<axis=0>(is, hs) ie = Expand(i1, to) im = Mod(ie, n3) g = GatherElements<axis=1>(z, im) "
    + "w1 = Unsqueeze(w, last) m = Mul(g, w1) y = ReduceSum<keepdims=0>(m, l1)",
    "repeat_interleave by TorchScript": ROUTED
    + "is = Shape(i) k = Slice(is, last, far, l0) c = Concat<axis=0>(l1, k) hot = OneHot(l1, n3, c) hs = Shape(hot) "
    + "none = Slice(hs, l0, l0, l0) to = Concat<axis=0>(none, last) times = Reshape(hot, to) x1 = Unsqueeze(x, l1) "
    + "xt = Tile(x1, times) xf = Flatten<axis=2>(xt) f = Reshape(i, last) wu = Gather(u, f) wd = Gather(d, f) "
    + "x3 = Unsqueeze(xf, l1) h = MatMul(x3, wu) a = Relu(h) o = MatMul(a, wd) os = Squeeze(o, l1) "
    + "wf = Reshape(w, last) wc = Unsqueeze(wf, last) m = Mul(os, wc) m3 = Reshape(m, pairs) "
    + "y = ReduceSum<keepdims=0>(m3, l1)",
    "masked input": ROUTED
    + "".join(
        f"b{e} = Equal(i, n{e}) k{e} = Cast<to=1>(b{e}) any{e} = ReduceMax<keepdims=1>(k{e}, last) "
        f"x{e} = Mul(x, any{e}) " + expert(e).replace("(x,", f"(x{e},") + weighed(e, f"o{e}")
        for e in range(3)
    )
    + SUM,
}


SOFT = "l = MatMul(x, r) p = Softmax<axis=-1>(l) v, i = TopK<axis=-1>(p, l2) zs = Shape(l) z = ConstantOfShape(zs) "
HOT_ALL = "os = Shape(i) f1 = Expand(unit, os) m = ScatterElements<axis=-1>(z, i, f1) "
LEAST = "least = Slice(v, l1, l2, l1) "
NORMED = "ps = ReduceSum<keepdims=1>(q, last) p_ = Div(q, ps) "
MASKED = {
    "scores times a scattered mask": SOFT + HOT_ALL + "q = Mul(p, m) " + NORMED,
    "scores times summed one-hots": SOFT + "h = OneHot<axis=-1>(i, n3, bits) hs = ReduceSum<keepdims=0>(h, l1) "
    + "m = Cast<to=1>(hs) q = Mul(m, p) " + NORMED,
    "scores that reach the least chosen": SOFT + LEAST + "b = GreaterOrEqual(p, least) m = Cast<to=1>(b) q = Mul(p, m) "
    + NORMED,
    "scores that reach the least of the chosen": SOFT + "least = ReduceMin<keepdims=1>(v, last) "
    + "b = GreaterOrEqual(p, least) m = Cast<to=1>(b) q = Mul(p, m) " + NORMED,
    "scores that exceed the largest other": SOFT.replace("l2)", "l3)")
    + "over = Slice(v, l2, l3, l1) b = Less(over, p) m = Cast<to=1>(b) q = Mul(p, m) " + NORMED,
    "the softmax of logits that reach the least": "l = MatMul(x, r) v, i = TopK<axis=-1>(l, l2) " + LEAST
    + "b = Less(l, least) n = Where(b, inf, l) p_ = Softmax<axis=-1>(n) ",
    "the softmax of chosen logits": SOFT.replace("TopK<axis=-1>(p", "TopK<axis=-1>(l") + HOT_ALL
    + "b = Cast<to=9>(m) n = Where(b, l, lowest) p_ = Softmax<axis=-1>(n) ",
    "a weight for each slot by its one-hot": SOFT + "i0 = Gather<axis=1>(i, n0) i1 = Gather<axis=1>(i, n1) "
    + "h0_ = OneHot<axis=-1>(i0, n3, bits) h1_ = OneHot<axis=-1>(i1, n3, bits) m0_ = Cast<to=1>(h0_) "
    + "m1_ = Cast<to=1>(h1_) g0_ = Mul(p, m0_) s0_ = ReduceSum<keepdims=1>(g0_, last) "
    + 's1_ = Einsum<equation="te,te->t">(p, m1_) s1u = Unsqueeze(s1_, last) a0_ = Add(s0_, zero) d_ = Add(a0_, s1u) '
    + "dc = Clip(d_, tiny) w0_ = Div(s0_, dc) w1_ = Div(s1u, dc) c0_ = Mul(w0_, m0_) c1_ = Mul(w1_, m1_) "
    + "p_ = Add(c0_, c1_) ",
}  # fmt: skip
for _name, _text in MASKED.items():
    _columns = COLUMNS.replace("(p,", "(p_,")
    SPELLINGS[_name] = _text + TERMS.replace("a0 ", "a0x ").replace("(a0,", "(a0x,") + _columns + SUM
SPELLINGS["tokens by a mask of every expert, einsums"] = (
    SOFT + "wn = ReduceSum<keepdims=1>(v, last) w = Div(v, wn) c = ScatterElements<axis=-1>(z, i, w) "
    'b = Greater(c, zero) m = Cast<to=1>(b) xe = Einsum<equation="th,te->eth">(x, m) '
    'h = Einsum<equation="eth,ehi->eti">(xe, u) a = Relu(h) o = Einsum<equation="eti,eih->eth">(a, d) '
    'y = Einsum<equation="te,eth->th">(c, o)'
)

ROWS = ROUTED + "f = Reshape(i, last) fs = Shape(f) e, order = TopK<axis=0, largest=0>(f, fs) {floor}"
ROWS += "g = Gather(x, t) g1 = Unsqueeze(g, l1) wu = Gather(u, e) wd = Gather(d, e) h = MatMul(g1, wu) a = Relu(h) "
ROWS += "o3 = MatMul(a, wd) o = Squeeze(o3, l1) "
FLOOR = "t = Div(order, n2) "
FLOOR_OF_TORCH = "q0 = Div(order, n2) neg = Less(order, n0) xor = Xor(neg, never) rest = Mod(order, n2) "
FLOOR_OF_TORCH += (
    "even = Equal(rest, n0) odd = Not(even) down = And(xor, odd) q1 = Sub(q0, n1) t = Where(down, q1, q0) "
)
WEIGHED_ROWS = "wf = Reshape(w, last) ws = Gather(wf, order) wc = Unsqueeze(ws, last) m = Mul(o, wc) xs = Shape(x) "
WEIGHED_ROWS += "zs = ConstantOfShape(xs) "
BACK = "wc = Unsqueeze(w, last) m = Mul(o2, wc) y = ReduceSum<keepdims=0>(m, l1)"
WIDE = "oc = Unsqueeze({0}, l1) s0 = Shape({1}) sx = ScatterElements<axis=0>(s0, l0, fs) all_ = Expand(n1, one_) "
WIDE += "less = Mul(all_, n_) same = Equal(sx, less) ws_ = Where(same, all_, sx) to = Expand(oc, ws_) "
SPELLINGS |= {
    "rows added by a scatter of elements": ROWS.format(floor=FLOOR) + WEIGHED_ROWS + "tc = Unsqueeze(t, l1) "
    + 'ms = Shape(m) to = Expand(tc, ms) y = ScatterElements<axis=0, reduction="add">(zs, to, m)',
    "rows by TorchScript's floor division": ROWS.format(floor=FLOOR_OF_TORCH) + WEIGHED_ROWS
    + 'tc = Unsqueeze(t, l1) y = ScatterND<reduction="add">(zs, tc, m)',
    "rows put back by the order of the order": ROWS.format(floor=FLOOR)
    + "_o, back = TopK<axis=0, largest=0>(order, fs) "
    + "ob = Gather(o, back) o2 = Reshape(ob, pairs) " + BACK,
    "rows put back by a scatter, expanded as TorchScript does": ROWS.format(floor=FLOOR) + "os_ = Shape(o) "
    + "zs = ConstantOfShape(os_) " + WIDE.format("order", "zs")
    + "ob = ScatterElements<axis=0>(zs, to, o) o2 = Reshape(ob, pairs) " + BACK,
}  # fmt: skip

PLAIN = ROUTED + "{}" + "".join(weighed(e, f"o{e}") for e in range(3)) + SUM
PICKED = ROUTED + TERMS + "".join(f"z{e} = Unsqueeze(o{e}, l1) " for e in range(3)) + "z = Concat<axis=1>(z0, z1, z2) "
PICKED += "xs = Shape(x) xt = Gather(xs, n0) all_ = Range(n0, xt, n1) {} w1 = Unsqueeze(w, last) m = Mul(g, w1) "
PICKED += "y = ReduceSum<keepdims=0>(m, l1)"
SPELLINGS |= {
    "features cut in two, in turn": PLAIN.format("".join(
        f"h{e} = MatMul(x, u{e}) c{e}_ = Reshape(h{e}, in_turn) b{e}_ = Gather<axis=2>(c{e}_, n0) k{e}_ = Slice(c{e}_, "
        f"l1, l2, l2) v{e}_ = Squeeze(k{e}_, l2) s{e}_ = Sigmoid(b{e}_) f{e}_ = Mul(b{e}_, s{e}_) "
        f"a{e} = Mul(f{e}_, v{e}_) o{e} = MatMul(a{e}, half{e}) " for e in range(3)
    )),
    "features cut in two, one half after the other": PLAIN.format("".join(
        f"h{e} = MatMul(x, u{e}) c{e}_ = Reshape(h{e}, in_halves) v{e}_, b{e}_ = Split<axis=1, num_outputs=2>(c{e}_) "
        f"s{e}_ = Sigmoid(b{e}_) f{e}_ = Mul(b{e}_, s{e}_) g{e}_ = Mul(f{e}_, v{e}_) a{e} = Squeeze(g{e}_, l1) "
        f"o{e} = MatMul(a{e}, half{e}) " for e in range(3)
    )),
    "a factor for each feature, and one for an expert": PLAIN.format(
        TERMS.replace("o0 =", "e0_ =").replace("o1 =", "e1_ =") + "o0 = Mul(e0_, scales) o1 = Div(e1_, two) "
    ),
    "a bias for one expert alone": PLAIN.format(TERMS.replace("a1 = Relu(h1)", "hb = Add(h1, row) a1 = Relu(hb)")),
    "weights squared": "l = MatMul(x, r) v, i = TopK<axis=-1>(l, l2) s_ = Sigmoid(v) sq = Pow(s_, two) "
    "n_1 = ReduceL1(sq, last) w = Div(sq, n_1) " + PLAIN.removeprefix(ROUTED).format(TERMS),
    "outputs by token and chosen": PICKED.format(
        "a1_ = Unsqueeze(all_, l1) wide_ = Max(a1_, i) to = Shape(wide_) ae = Expand(a1_, to) ac = Unsqueeze(ae, last) "
        "ic = Unsqueeze(i, last) at = Concat<axis=-1>(ac, ic) g = GatherND(z, at) "
    ),
    "outputs by chosen and token": PICKED.format(
        "zt = Transpose<perm=[1, 0, 2]>(z) a1_ = Unsqueeze(all_, l1) to = Shape(i) ae = Expand(a1_, to) "
        "ac = Unsqueeze(ae, last) ic = Unsqueeze(i, last) at = Concat<axis=-1>(ic, ac) g = GatherND(zt, at) "
    ),
}  # fmt: skip


SPELLINGS["weighted outputs side by side, summed"] = (
    PLAIN.removesuffix(SUM).format(TERMS)
    + "".join(f"z{e} = Unsqueeze(t{e}, l0) " for e in range(3))
    + "z = Concat<axis=0>(z0, z1, z2) y = ReduceSum<keepdims=0>(z, l0)"
)


def spelled(text):
    held = {"last": [-1], "far": [2**63 - 1], "pairs": [-1, 2, H], "unit": np.ones(1, np.float32)}
    rng = np.random.default_rng(11)
    drawn = {f"half{e}": (INTER // 2, H) for e in range(3)} | {"scales": H, "row": INTER}
    held |= {name: rng.standard_normal(size).astype(np.float32) for name, size in drawn.items()}
    held |= {"in_turn": [-1, INTER // 2, 2], "in_halves": [-1, 2, INTER // 2]}
    held |= {"never": False, "three_": np.float32(3), "always": True, "one_": [2], "n_": -1}
    held |= {"tiny": np.float32(1e-9), "lowest": np.finfo(np.float32).min}
    return block(text, bits=np.array([0, 1]), n2s=np.array([1, 0]), **held)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_same_in_other_words(name):
    assert operators(exact(spelled(SPELLINGS[name])))["MoE"] == 1


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("one-hot by einsum", "tke,tk->te", "tke,tj->te"),
        ("one-hot by matmul", "bits", "n2s"),
        ("weight before down", "Mul(a, pc)", "Add(a, pc)"),
        ("first slots of a larger TopK", "Slice(v3, l0, l2, l1)", "Slice(v3, l1, l3, l1)"),
        ("einsum of three", "eti,eih,te->th", "eti,eih,tj->th"),
        ("einsum of three, the chosen", "tk,tkih,tki->th", "tj,tkih,tki->th"),
        ("take_along_dim", "Mod(ie, n3)", "Mod(ie, n2)"),
        ("repeat_interleave by TorchScript", "hot = OneHot(l1, n3, c)", "hot = OneHot(l0, n3, c)"),
        ("masked input", "MatMul(x1, u1)", "MatMul(x2, u1)"),
        ("masked input", "ReduceMax<keepdims=1>(k0, last)", "ReduceMin<keepdims=1>(k0, last)"),
        ("rows added by a scatter of elements", "ConstantOfShape(xs)", "Identity(x)"),
        ("features cut in two, in turn", "Gather<axis=2>(c1_, n0)", "Gather<axis=1>(c1_, n0)"),
        ("features cut in two, one half after the other", "Mul(b1_, s1_)", "Mul(v1_, s1_)"),
        ("a factor for each feature, and one for an expert", "Mul(e0_, scales)", "Add(e0_, x)"),
        ("weights squared", "Pow(s_, two)", "Pow(s_, three_)"),
        ("weighted outputs side by side, summed", "ReduceSum<keepdims=0>(z, l0)", "ReduceMax<keepdims=0>(z, l0)"),
        ("weighted outputs side by side, summed", "Concat<axis=0>(z0, z1, z2)", "Concat<axis=0>(z0, z1, z1)"),
        ("outputs by token and chosen", "Concat<axis=-1>(ac, ic)", "Concat<axis=-1>(ic, ac)"),
        ("outputs by chosen and token", "Range(n0, xt, n1)", "Range(n1, xt, n1)"),
        ("rows added by a scatter of elements", "Unsqueeze(t, l1)", "Unsqueeze(order, l1)"),
        ("rows by TorchScript's floor division", "Xor(neg, never)", "Xor(neg, always)"),
        ("rows put back by the order of the order", "TopK<axis=0, largest=0>(order", "TopK<axis=0>(order"),
        ("rows put back by a scatter, expanded as TorchScript does", "TopK<axis=0, largest=0>(f", "TopK<axis=0>(f"),
        ("scores times a scattered mask", "Mul(p, m)", "Mul(l, m)"),
        ("scores times a scattered mask", "keepdims=1>(q, last)", "keepdims=1>(p, last)"),
        ("scores that reach the least chosen", "GreaterOrEqual(p, least)", "GreaterOrEqual(l, least)"),
        ("scores that reach the least chosen", "GreaterOrEqual(p, least)", "LessOrEqual(p, least)"),
        ("scores that reach the least of the chosen", "ReduceMin<", "ReduceMax<"),
        ("scores that exceed the largest other", "Less(over, p)", "Less(p, over)"),
        ("the softmax of logits that reach the least", "Where(b, inf, l)", "Where(b, l, inf)"),
        ("the softmax of chosen logits", "Where(b, l, lowest)", "Where(b, l, tiny)"),
        ("a weight for each slot by its one-hot", "Mul(w0_, m0_)", "Mul(w0_, m1_)"),
        ("a weight for each slot by its one-hot", "dc = Clip(d_, tiny)", "dc = Clip(d_, two)"),
        ("tokens by a mask of every expert, einsums", "te,eth->th", "tj,eth->th"),
        ("tokens by a mask of every expert, einsums", "Greater(c, zero)", "Greater(c, tiny)"),
    ],
)
def test_other_words_that_mean_something_else(name, old, new):
    assert old in SPELLINGS[name]
    report = fuse(spelled(SPELLINGS[name].replace(old, new))).report
    assert not report.applied and report.declined


HIDDEN = "g = MatMul(x, ub) gr = Tanh(g) l = MatMul(gr, ur) v, i = TopK<axis=-1>(l, l2) w = Softmax<axis=-1>(v) "


def test_a_router_whose_hidden_layer_is_read_elsewhere():
    """The router stays as it is: only what is behind its logits goes."""
    rng = np.random.default_rng(7)
    held = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"ub": (H, H), "ur": (H, 3)}.items()}
    terms = TERMS + "".join(weighed(e, f"o{e}") for e in range(3)) + "s = Add(t0, t1) s2 = Add(s, t2) "
    found = operators(exact(block(HIDDEN + terms + "y = Add(s2, gr)", last=[-1], **held)))
    assert (found["MoE"], found["MatMul"], found["Tanh"]) == (1, 2, 1)
    inside = block(HIDDEN + terms + "y = Add(s2, o1)", last=[-1], **held)
    declines(inside, "'o1' inside of the block is also read by Add")


def test_a_sum_that_starts_from_another_value():
    """A residual is added behind; what is no larger than a row is no start, and says so."""
    terms = ROUTED + TERMS + "".join(weighed(e, f"o{e}") for e in range(3))
    started = operators(exact(block(terms + "s = Add(x, t0) s1 = Add(s, t1) y = Add(s1, t2)", last=[-1])))
    assert (started["MoE"], started["Add"]) == (1, 1)
    row = "q = ReduceSum(x, last) s = Add(q, t0) s1 = Add(s, t1) y = Add(s1, t2)"
    declines(block(terms + row, last=[-1]), "what a sum of experts is added to is not as large as it")


FILLED = "l = MatMul(x, r) p = Softmax<axis=-1>(l) i = ArgMax<axis=-1, keepdims=0>(p) v = ReduceMax(p, last) "


def filled(experts=(0, 1, 2), seed="x", bias=""):
    """Switch: each token's one expert put where the token was."""
    text, total = FILLED, seed
    for e in experts:
        text += f"q{e} = Equal(i, n{e}) nz{e} = NonZero(q{e}) r{e} = Transpose(nz{e}) g{e} = GatherND(x, r{e}) "
        text += f"h{e} = MatMul(g{e}, u{e}) a{e} = Relu(h{e}) o{e} = MatMul(a{e}, d{e}) "
        text += f"f{e} = ScatterND({total}, r{e}, o{e}) "
        total = f"f{e}"
    return block(text + f"y = Mul({total}, v)", last=[-1])


def test_outputs_put_over_the_tokens():
    exact(filled())


def test_outputs_put_over_the_tokens_but_of_one_expert_decline():
    declines(filled(experts=(0, 2)), "")  # who chose the other keeps what was there


ALONE = FILLED.replace("keepdims=0>(p)", "keepdims=1>(p)") + "".join(
    f"m{e} = Equal(i, n{e}) c{e} = Cast<to=1>(m{e}) x{e} = Mul(x, c{e}) h{e} = MatMul(x{e}, u{e}) a{e} = Relu(h{e}) "
    f"t{e} = MatMul(a{e}, d{e}) "
    for e in range(3)
)


def test_experts_of_nothing_return_nothing():
    """``sum(expert(x * mask))``, a token having one expert."""
    exact(block(ALONE + "s = Add(t0, t1) s2 = Add(s, t2) y = Mul(s2, v)", last=[-1]))
    biased = ALONE.replace("a1 = Relu(h1)", "hb = Add(h1, ub) a1 = Relu(hb)")
    report = fuse(block(biased + "s = Add(t0, t1) s2 = Add(s, t2) y = Mul(s2, v)", last=[-1], ub=BIAS)).report
    assert not report.applied and report.declined


BIAS = np.ones(INTER, np.float32)


def test_an_expert_that_is_stored_twice():
    """Exporters fold a weight once for each slot's sum."""
    text = ROUTED
    for j in range(2):
        text += f"w{j} = Gather<axis=1>(w, l{j}) i{j} = Gather<axis=1>(i, l{j}) "
        for e in range(3):
            up = "other" if (e, j) == (0, 1) else f"u{e}"
            text += f"h{e}{j} = MatMul(x, {up}) a{e}{j} = Relu(h{e}{j}) o{e}{j} = MatMul(a{e}{j}, d{e}) "
            text += f"m{e}{j} = Equal(i{j}, n{e}) c{e}{j} = Cast<to=1>(m{e}{j}) p{e}{j} = Mul(c{e}{j}, w{j}) "
            text += f"t{e}{j} = Mul(o{e}{j}, p{e}{j}) "
    terms = [f"t{e}{j}" for j in range(2) for e in range(3)]
    total = terms[0]
    for n, term in enumerate(terms[1:]):
        text += f"{'y' if n == 4 else f's{n}'} = Add({total}, {term}) "
        total = f"s{n}"
    weight = np.random.default_rng(5).standard_normal((H, INTER)).astype(np.float32)
    exact(block(text, u0=weight, other=weight.copy()))
    declines(block(text, u0=weight, other=weight + 1), "expert 0 is another one in another slot")


@pytest.mark.parametrize("rank", [2, 3])
def test_a_router_of_rows_of_tokens(rank):
    """Scores [B, S, E], chosen and summed in three dimensions, and put back into two."""
    text = (ROUTED + TERMS + "".join(weighed(e, f"o{e}") for e in range(3))).replace("(x,", "(x3,") + "s = Add(t0, t1) "
    text = "x3 = Reshape(x, three) " + text + "y3 = Add(s, t2) y = Reshape(y3, rows)"
    exact(block(text, last=[-1], three=[5, -1, H] if rank == 3 else [-1, H]))


def test_shapes_of_what_is_broadcast_are_not_asked_of_the_model():
    """TorchScript calls a dimension that is broadcast from two others something of its own."""
    text = "l = MatMul(x, r) mx = ReduceMax<keepdims=1>(l, last) df = Sub(l, mx) p = Softmax<axis=-1>(df) "
    text += "v, i = TopK<axis=-1>(l, l2) w = GatherElements<axis=1>(p, i) " + TERMS
    model = block(text + "".join(weighed(e, f"o{e}") for e in range(3)) + SUM, last=[-1])
    own = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["other", 3]) for name in ("df", "p")]
    model.graph.value_info.extend(own)
    assert operators(exact(model))["MoE"] == 1

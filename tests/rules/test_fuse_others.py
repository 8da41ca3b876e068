"""fuse-experts where a router chooses among more than experts, chooses one after the other, or mixes all of them."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from test_fuse_experts import FUSE, fuse, operators, relative

from rewriter.parity.runtime import OrtRuntime

H, INTER = 8, 6


def block(text, experts=3, columns=0, inputs="", **numbers):
    """A model of x [T, 8] -> y by its nodes; ``r``: the router, ``u``, ``d``: stacks of all, ``u0``, ``d0``: of one."""
    rng = np.random.default_rng(0)
    held = {
        "r": rng.standard_normal((H, columns or experts)),
        "u": rng.standard_normal((experts, H, INTER)),
        "d": rng.standard_normal((experts, INTER, H)),
        "const": rng.standard_normal(H),
        "ub": rng.standard_normal((experts, 1, INTER)),
    }
    held |= {f"{name}{e}": held[name][e] for name in "ud" for e in range(experts)}
    held = {name: array.astype(np.float32) for name, array in held.items()}
    held |= {f"n{i}": np.array(i) for i in range(8)} | {f"l{i}": np.array([i]) for i in (0, 1, 2, 3, -1, -2)}
    held |= {"zero": np.float32(0), "inf": np.float32(-np.inf), "two": np.float32(2)}
    held |= {"rows": np.array([-1, H]), "wide": np.array([-1, 1]), "flat": np.array([experts, -1, H])}
    held |= {name: np.array(value) for name, value in numbers.items()}
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[T,{H}] x{inputs}) => (float[T,{H}] y) {{ {text} }}'
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(held[n]), n) for n in held if n in used)
    return model


def exact(model, blocks=1, **given):
    """Fuses, and holds the result against what was there; returns it."""
    result = fuse(model)
    assert result.report.applied == {FUSE: blocks}, result.report.declined
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((40, H)).astype(np.float32), "ids": rng.integers(0, 6, 40)} | given
    feeds = {i.name: feeds[i.name] for i in model.graph.input}
    before, after = (OrtRuntime().run(m, feeds)["y"] for m in (model, result.model))
    assert relative(before, after) < 1e-5
    assert not fuse(result.model).report.declined
    return result.model


def declines(model, reason):
    result = fuse(model)
    assert not result.report.applied
    found = [why for _, why in result.report.declined]
    assert found and reason in found[0], found


def expert(e, out="o"):
    return f"h{e} = MatMul(x, u{e}) a{e} = Relu(h{e}) {out}{e} = MatMul(a{e}, d{e}) "


def weighed(e, value):
    return (
        f"m{e} = Equal(i, n{e}) c{e} = Cast<to=1>(m{e}) p{e} = Mul(c{e}, w) q{e} = ReduceSum(p{e}, l-1) "
        f"t{e} = Mul({value}, q{e}) "
    ).replace("l-1", "last")


TOPK = "l = MatMul(x, r) v, i = TopK<axis=-1>(l, {k}) w = Softmax<axis=-1>(v) "
ALL = "l = MatMul(x, r) p = Softmax<axis=-1>(l) " + "".join(expert(e) for e in range(3))
UNROLLED = ALL + "".join(f"s{e} = Gather<axis=-1>(p, l{e}) t{e} = Mul(o{e}, s{e}) " for e in range(3))
STACKED = ALL + "".join(f"z{e} = Unsqueeze(o{e}, l1) " for e in range(3)) + "z = Concat<axis=1>(z0, z1, z2) "


@pytest.mark.parametrize(
    "text",
    [
        UNROLLED + "a = Add(t0, t1) y = Add(a, t2)",
        STACKED + 'y = Einsum<equation="te,teh->th">(p, z)',
        STACKED + "q = Unsqueeze(p, last) m = Mul(z, q) y = ReduceSum<keepdims=0>(m, l1)",
        STACKED + "q = Unsqueeze(p, l1) m = MatMul(q, z) y = Squeeze(m, l1)",
    ],
)
def test_a_mixture_of_all_experts(text):
    model = exact(block(text, last=[-1]))
    assert operators(model)["MoE"] == 1 and not operators(model)["Softmax"]


def test_what_is_no_mixture_of_all():
    declines(block(UNROLLED + "y = Add(t0, t1)"), "expert 2 of 3 is missing")
    declines(block(UNROLLED.replace("axis=-1>(p, l1)", "axis=-1>(p, l0)") + "a = Add(t0, t1) y = Add(a, t2)"), "twice")
    turned = UNROLLED.replace("Softmax<axis=-1>", "Softmax<axis=0>")
    assert not fuse(block(turned + "a = Add(t0, t1) y = Add(a, t2)")).report.applied


OTHERS = TOPK.format(k="l2") + "".join(expert(e) + weighed(e, f"o{e}") for e in range(2))
IDENTITY, CONSTANT = weighed(4, "x"), weighed(5, "const")


@pytest.mark.parametrize("k", ["l1", "l2", "l3"])
@pytest.mark.parametrize("seed", ["", "x"])
@pytest.mark.parametrize("others", ["both", "identity", "constant"])
def test_experts_that_are_nothing_the_token_or_a_constant(k, seed, others):
    """Of six two are experts, and two are nothing: only those that are experts have weights in the operator."""
    text = OTHERS.replace("(l, l2)", f"(l, {k})") + (IDENTITY if others != "constant" else "")
    text += CONSTANT if others != "identity" else ""
    terms = [*([seed] * bool(seed)), "t0", "t1", *["t4"] * (others != "constant"), *["t5"] * (others != "identity")]
    for step, (total, term) in enumerate(zip([terms[0], *(f"y{s}" for s in range(9))], terms[1:], strict=False)):
        text += f"{'y' if step == len(terms) - 2 else f'y{step}'} = Add({total}, {term}) "
    model = exact(block(text, experts=2, columns=6, last=[-1]))
    (moe,) = (node for node in model.graph.node if node.op_type == "MoE")
    held = {i.name: list(i.dims) for i in model.graph.initializer}
    assert held[moe.input[2]] == [2, INTER, H]
    assert {a.name: helper.get_attribute_value(a) for a in moe.attribute}["k"] == min(int(k[1]), 2)


def test_what_is_no_such_expert():
    sum_ = "y0 = Add(t0, t1) y = Add(y0, {})"
    declines(block(OTHERS + "y = Add(t0, t1)", experts=2, columns=3, last=[-1]), "expert 2 of 3 is missing")
    other = "x2 = Mul(x, two) " + weighed(4, "x2")
    reason = "expert 4: Mul does not belong to an expert"
    declines(block(OTHERS + other + sum_.format("t4"), experts=2, columns=6, last=[-1]), reason)


DENSE = """
    l = MatMul(x, r) v, i = TopK<axis=-1>(l, {k}) n = Shape(l) e = Expand(inf, n) s = ScatterElements<axis=-1>(e, i, v)
    g = Sigmoid(s) b = Tile(x, times) gt = Transpose<perm=[1, 0]>(g) gf = Reshape(gt, wide) m = Mul(b, gf)
    f = Reshape(m, flat) h = MatMul(f, u) a = Relu(h) o = MatMul(a, d) y = ReduceSum<keepdims=0>(o, l0)
"""


def test_tokens_times_their_weight():
    """Llama 4: one expert for each token, and the sigmoid of its logit before it."""
    model = exact(block(DENSE.format(k="l1"), times=[3, 1]))
    assert operators(model)["MoE"] == operators(model)["Sigmoid"] == operators(model)["TopK"] == 1


def test_tokens_times_their_weights_near_misses():
    reason = "the tokens are multiplied by the weights of several experts before them"
    declines(block(DENSE.format(k="l2"), times=[3, 1]), reason)
    biased = DENSE.format(k="l1").replace("a = Relu(h)", "hb = Add(h, ub) a = Relu(hb)")
    assert not fuse(block(biased, times=[3, 1])).report.applied  # of a token that is nothing the bias is left
    zeros = DENSE.format(k="l1").replace("Expand(inf, n)", "Expand(zero, n)")
    assert not fuse(block(zeros, times=[3, 1])).report.applied  # the sigmoid of nothing is a half


SKIP = """
    l = MatMul(x, r) p = Softmax<axis=-1>(l) v, j = TopK<axis=-1>(p, {k}) k = Equal(j, n{last})
    w = Where(k, zero, v) i = Where(k, n0, j)
"""
GATHERED = """
    wu = Gather(u, i) wd = Gather(d, i) x1 = Unsqueeze(x, l1) x2 = Unsqueeze(x1, l1) h = MatMul(x2, wu)
    a = Relu(h) o = MatMul(a, wd) os = Squeeze(o, l2) w1 = Unsqueeze(w, l2) m = Mul(os, w1)
    y = ReduceSum<keepdims=0>(m, l1)
"""


@pytest.mark.parametrize("k", ["l1", "l2", "l3"])
def test_a_choice_that_skips_a_token(k):
    """Zaya: the last of four is no expert; its slot has the first one and no weight."""
    model = exact(block(SKIP.format(k=k, last=3) + GATHERED, columns=4))
    (scatter,) = (node for node in model.graph.node if node.op_type == "ScatterElements")
    assert helper.get_attribute_value(scatter.attribute[-1]) == b"add"


def test_a_choice_of_one_that_skips_a_token_and_has_no_slot():
    """As torch.onnx flattens it: neither the choice nor its weights have a dimension for the one slot."""
    flat_ = """
        f = Reshape(i, last) g = Reshape(w, last) wu = Gather(u, f) wd = Gather(d, f) x1 = Unsqueeze(x, l1)
        h = MatMul(x1, wu) a = Relu(h) o = MatMul(a, wd) os = Squeeze(o, l1) w1 = Unsqueeze(g, last) y = Mul(os, w1)
    """
    exact(block(SKIP.format(k="l1", last=3) + flat_, columns=4, last=[-1]))


def test_a_choice_that_skips_near_misses():
    declines(block(SKIP.format(k="l2", last=2) + GATHERED, columns=4), "is not understood")
    other = SKIP.format(k="l2", last=3).replace("w = Where(k, zero, v)", "w = Where(k, two, v)")
    assert not fuse(block(other + GATHERED, columns=4)).report.applied


MIXER = """
    l = MatMul(x, r) i0 = ArgMax<axis=-1>(l) p0 = Softmax<axis=-1>(l) w0 = GatherElements<axis=-1>(p0, i0)
    n = Shape(i0) e = Expand(inf, n) s = ScatterElements<axis=-1>({from_}, i0, e) i1 = ArgMax<axis=-1>(s)
    p1 = Softmax<axis=-1>(s) w1 = GatherElements<axis=-1>(p1, i1) i = Concat<axis=-1>(i0, i1)
    w = Concat<axis=-1>({weights})
"""


def test_one_choice_after_the_other():
    """Phi-3.5: two ArgMaxima, the second of what the first has left."""
    text = MIXER.format(from_="l", weights="w0, w1")
    exact(block(text + GATHERED.replace("w1 =", "wx =").replace("(os, w1)", "(os, wx)")))


def test_one_choice_after_the_other_near_misses():
    rest = GATHERED.replace("w1 =", "wx =").replace("(os, w1)", "(os, wx)")
    crossed = MIXER.format(from_="l", weights="w1, w0")
    assert not fuse(block(crossed + rest)).report.applied
    raw = MIXER.format(from_="l", weights="w0, w1").replace("Elements<axis=-1>(p1, i1)", "Elements<axis=-1>(l, i1)")
    declines(block(raw + rest), "it chooses one expert after the other")


TABLE = """
    l = MatMul(x, r) p = Sigmoid(l) i = Gather(table, ids) v = GatherElements<axis=-1>(p, i)
    t = ReduceSum<keepdims=1>(v, last) w = Div(v, t)
"""
DISTINCT = [[0, 1], [1, 2], [2, 0], [1, 0], [2, 1], [0, 2]]


@pytest.mark.parametrize("table", [DISTINCT, [[0, 0], [1, 2], [2, 2], [1, 0], [1, 1], [0, 2]], [[0, 0]] * 6])
def test_a_table_of_token_ids_chooses(table):
    """DeepSeek-V4's first layers; a table may name an expert twice, or not at all."""
    model = exact(block(TABLE + GATHERED, inputs=", int64[T] ids", table=table, last=[-1]))
    assert operators(model)["MoE"] == 1


ONE = "i0 = Gather(table, ids) i = Unsqueeze(i0, last) " + "".join(
    expert(e) + f"m{e} = Equal(i, n{e}) c{e} = Cast<to=1>(m{e}) t{e} = Mul(o{e}, c{e}) " for e in range(3)
)


def test_a_chosen_expert_counts_once_where_nothing_weighs_it():
    def chosen(text):
        sum_ = "s = Add(t0, t1) y = Add(s, t2)"
        return block(text + sum_, inputs=", int64[T] ids", table=[0, 1, 2, 2, 1, 0], last=[-1])

    exact(chosen(ONE))
    declines(chosen(ONE.replace("Equal(i, n2)", "Equal(i, n1)")), "expert 1 is mixed in twice")
    declines(chosen(ONE.replace("Relu", "Gelu")), "MoE has no activation")


def test_a_table_chooses_for_tokens_of_several_rows():
    """A hash layer as torch.onnx exports it: ids [B, S], GatherND, and no dimension for the one slot."""
    text = "i1 = Unsqueeze(ids, last) i = GatherND(table, i1) f = Reshape(x, rows3) " + "".join(
        expert(e).replace("(x,", "(f,")
        + f"m{e} = Equal(i, n{e}) z{e} = Unsqueeze(m{e}, last) c{e} = Cast<to=1>(z{e}) t{e} = Mul(o{e}, c{e}) "
        for e in range(3)
    )
    text += "s = Add(t0, t1) y3 = Add(s, t2) y = Reshape(y3, rows)"
    model = block(text, inputs=", int64[5, 8] ids", table=[0, 1, 2, 2, 1, 0], last=[-1], rows3=[5, 8, H])
    feeds = {"ids": np.arange(40).reshape(5, 8) % 6}
    model = exact(model, **feeds)
    assert operators(model)["MoE"] == 1


GROUPS = "g = MatMul(x, gate) gp = Softmax<axis=-1>(g) " + "".join(
    f"l{a}_ = MatMul(x, r{a}) v{a}, i{a} = TopK<axis=-1>(l{a}_, l1) w{a} = Softmax<axis=-1>(v{a}) "
    f"s{a} = Gather<axis=-1>(gp, l{a}) "
    for a in range(2)
)


def grouped(text, **numbers):
    rng = np.random.default_rng(3)
    held = {"gate": (H, 2), "r0": (H, 2), "r1": (H, 2)}
    held = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in held.items()}
    return block(text, experts=4, **held, **numbers)


def of_groups(other=""):
    """Two routers under one of groups, whose weight multiplies every expert; ``other``: the second expert's."""
    text, total = GROUPS, ""
    for e in range(4):
        a, own = divmod(e, 2)
        by = other if e == 1 and other else f"s{a}"
        text += expert(e) + f"m{e} = Equal(i{a}, n{own}) c{e} = Cast<to=1>(m{e}) p{e} = Mul(c{e}, w{a}) "
        text += f"q{e} = ReduceSum(p{e}, last) t{e} = Mul(o{e}, q{e}) b{e} = Mul(t{e}, {by}) "
        text += f"{'y' if e == 3 else f'y{e}'} = Add({total}, b{e}) " if total else ""
        total = f"y{e}" if total else f"b{e}"
    return grouped(text, last=[-1])


def test_experts_in_two_levels_are_an_operator_for_each_group():
    assert operators(exact(of_groups(), blocks=2))["MoE"] == 2  # and the outer router has no experts left


def test_one_expert_of_a_group_under_another_weight_declines():
    report = fuse(of_groups(other="s1")).report
    assert report.applied == {FUSE: 1} and "expert 0 of 2 is missing" in [why for _, why in report.declined]


def test_experts_of_different_widths_are_filled_up():
    """Rows of zeros where others are wider; not where that would more than double the weights."""
    text = TOPK.format(k="l2") + "".join(expert(e) + weighed(e, f"o{e}") for e in range(3))
    text += "s = Add(t0, t1) y = Add(s, t2)"

    def of_widths(*widths):
        rng = np.random.default_rng(2)
        held = {f"u{e}": rng.standard_normal((H, n)).astype(np.float32) for e, n in enumerate(widths)}
        held |= {f"d{e}": rng.standard_normal((n, H)).astype(np.float32) for e, n in enumerate(widths)}
        return block(text, last=[-1], **held)

    model = exact(of_widths(4, 6, 5))
    (moe,) = (node for node in model.graph.node if node.op_type == "MoE")
    assert {i.name: list(i.dims) for i in model.graph.initializer}[moe.input[2]] == [3, 6, H]
    declines(of_widths(2, 2, 64), "gate of expert 2 is [64, 8], of others [2, 8]")


def of_layers(second="012", activation="Relu"):
    """Two layers that share their experts, each with a router of its own; ``second``: what the second one sums."""
    text, x = "", "x"
    for layer, experts in enumerate(("012", second)):
        own, total = "", ""
        for e in experts:
            own += expert(e).replace("(x,", f"({x},") + weighed(e, f"o{e}")
            own += f"s{e} = Add({total}, t{e}) " if total else ""
            total = f"s{e}" if total else f"t{e}"
        own = TOPK.format(k="l2").replace("(x, r)", f"({x}, r)") + own.replace("Relu", activation if layer else "Relu")
        names = [word for word in own.split() if own.count(f" {word} =") or own.startswith(f"{word} =")]
        for name in sorted({*names, "v", total}, key=len, reverse=True):
            own = re.sub(rf"\b{name}\b", f"{name}_{layer}", own)
        text += own + (f"{x}_ = Add({x}, {total}_{layer}) " if not layer else f"y = Add({x}, {total}_{layer}) ")
        x = f"{x}_"
    return block(text, last=[-1])


def test_layers_that_share_their_experts_share_them_fused():
    model = exact(of_layers(), blocks=2)
    first, second = (node for node in model.graph.node if node.op_type == "MoE")
    assert list(first.input[2:]) == list(second.input[2:])
    assert sum(len(i.dims) == 3 for i in model.graph.initializer) == 2


@pytest.mark.parametrize("how", [{"second": "01"}, {"activation": "Tanh"}])
def test_experts_that_something_else_reads_stay_unless_that_is_the_same_block(how):
    result = fuse(of_layers(**how))
    assert not result.report.applied
    assert any("would stay in the model: MatMul also reads it" in why for _, why in result.report.declined)


SOFT = """
    e = Reshape(x, batch) l = MatMul(e, r) p = Softmax<axis=1>(l) pt = Transpose<perm=[0, 2, 1]>(p)
    z = MatMul(pt, e) zt = Transpose<perm=[1, 0, 2]>(z) h = MatMul(zt, u) a = Relu(h) o = MatMul(a, d)
    ot = Transpose<perm=[1, 0, 2]>(o) c = Softmax<axis=2>(l) m = MatMul(c, ot) y = Squeeze(m, l0)
"""
CHOOSING = """
    l = MatMul(x, r) lt = Transpose<perm=[1, 0]>(l) v, i = TopK<axis=1>(lt, l2) z = Gather(x, i)
    h = MatMul(z, u) a = Relu(h) o = MatMul(a, d) v1 = Unsqueeze(v, last) m = Mul(o, v1) mf = Reshape(m, rows)
    f = Reshape(i, wide) n = Shape(x) s = Expand(zero, n) y = ScatterND<reduction="add">(s, f, mf)
"""


def test_what_no_token_chooses_says_so():
    declines(block(SOFT, batch=[1, -1, H], last=[-1]), "every expert reads mixtures of all tokens, as in Soft MoE")
    declines(block(CHOOSING, last=[-1]), "the experts choose their tokens, and not each token its experts")


FLATTENED = """
    b = Reshape(x, rows) l = MatMul(b, r) v, i = TopK<axis=-1>(l, l2) w = Softmax<axis=-1>(v)
    zs = Shape(l) z = ConstantOfShape(zs) p = ScatterElements<axis=-1>(z, i, w)
    t = Tile(b, copies) x3 = Reshape(t, flat) h = MatMul(x3, u) a = Relu(h) o = MatMul(a, d)
    xs = Shape(x) bs = Slice(xs, l0, l1) to = Concat<axis=0>(l3, bs, last, width) o4 = Reshape(o, to)
    pt = Transpose<perm=[1, 0]>(p) ps = Concat<axis=0>(l3, bs, last) p3 = Reshape(pt, ps) p4 = Unsqueeze(p3, last)
    m = Mul(o4, p4) y = ReduceSum<keepdims=0>(m, l0)"""
"""All experts read rows that the router reads too; their sum has the shape of the tokens (GPT-OSS in transformers)."""


def test_rows_that_the_router_reads_too():
    """Without tokens the original says that there is one in a sequence: Reshape to -1 has nothing to go by."""
    model = block(FLATTENED, last=[-1], width=[H], copies=[3, 1])
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(helper.make_tensor_value_info(value.name, 1, ["B", "S", H]))
    x = np.random.default_rng(1).standard_normal((4, 5, H)).astype(np.float32)
    assert operators(exact(model, x=x))["MoE"] == 1


WRITTEN = "xs = Shape(x) y0 = ConstantOfShape(xs) "
for _e in range(3):
    WRITTEN += (
        f"m{_e} = Equal(i, n{_e}) z{_e} = NonZero(m{_e}) j{_e} = Transpose<perm=[1, 0]>(z{_e}) "
        f"g{_e} = GatherND(x, j{_e}) "
        f"{expert(_e).replace('(x,', f'(g{_e},')} {'y' if _e == 2 else f'y{_e + 1}'} = ScatterND(y{_e}, j{_e}, o{_e}) "
    )
BY_SCORE = "l = MatMul(x, r) i = ArgMax<axis=-1, keepdims=0>(l) "
BY_TABLE = "i = Gather(table, ids) "
GATHERED_ONE = """
    wu = Gather(u, i) wd = Gather(d, i) x1 = Unsqueeze(x, l1) h = MatMul(x1, wu) a = Relu(h) o = MatMul(a, wd)
    y = Squeeze(o, l1)
"""


@pytest.mark.parametrize("experts", [WRITTEN, GATHERED_ONE])
@pytest.mark.parametrize("choice", [BY_SCORE, BY_TABLE])
@pytest.mark.parametrize("behind", ["", "y = Exp(out) ", "sq = Mul(out, out) y = Add(sq, x)"])
def test_one_expert_of_each_token_that_nothing_weighs(choice, experts, behind):
    """Hash layers, and a choice by scores that mix nothing; what is behind stays behind."""
    text = choice + (experts.replace("y = ", "out = ") + behind if behind else experts)
    exact(block(text, inputs=", int64[T] ids" * (choice == BY_TABLE), table=[0, 1, 2, 2, 1, 0], last=[-1]))


def test_an_unweighed_expert_in_each_of_two_slots_is_no_block():
    """What is written over is not summed."""
    text = (TOPK.format(k="l2") + WRITTEN).replace("(i, n", "(i0, n") + " "
    text = text.replace("xs = Shape(x)", "i0 = Gather<axis=1>(i, n0) xs = Shape(x)")
    assert not fuse(block(text, last=[-1])).report.applied


SCALED = "l = MatMul(x, r) v, i2 = TopK<axis=-1>(l, l1) sv = Sigmoid(v) xs = Shape(x) y0 = ConstantOfShape(xs) "
SCALED += "c = Mul(x, sv) i = Gather<axis=1>(i2, n0) "


@pytest.mark.parametrize("way", ["rows added", "rows put in and added", "all tokens, masked"])
def test_tokens_that_are_scaled_before_the_one_expert_of_each(way):
    """Llama 4 where the router's weight is applied to the input; what is mixed then has no weight."""
    text = SCALED
    for e in range(3):
        rows = f"m{e} = Equal(i, n{e}) z{e} = NonZero(m{e}) j{e} = Transpose<perm=[1, 0]>(z{e}) "
        rows += f"g{e} = GatherND(c, j{e}) {expert(e).replace('(x,', f'(g{e},')} "
        put = f"b{e} = ConstantOfShape(xs) s{e} = ScatterND(b{e}, j{e}, o{e}) y{e + 1} = Add(y{e}, s{e}) "
        dense = expert(e).replace("(x,", "(c,") + f" m{e} = Equal(i2, n{e}) f{e} = Cast<to=1>(m{e}) "
        dense += f"t{e} = Mul(o{e}, f{e}) "
        text += {
            "rows added": rows + f'y{e + 1} = ScatterND<reduction="add">(y{e}, j{e}, o{e}) ',
            "rows put in and added": rows + put,
            "all tokens, masked": dense + f"y{e + 1} = Add(y{e}, t{e}) ",
        }[way]
    exact(block(text.replace("y3 =", "y ="), last=[-1]))


def test_rows_that_are_added_where_a_token_has_several_experts_are_no_sum_of_each_once():
    """One expert of two slots, unweighed: the operator has no such weights."""
    text = (TOPK.format(k="l2") + WRITTEN).replace("= ScatterND(y", '= ScatterND<reduction="add">(y')
    text = text.replace("xs = Shape(x)", "i0 = Gather<axis=1>(i, n0) xs = Shape(x)").replace("(i, n", "(i0, n")
    assert not fuse(block(text.replace("Gather<axis=1>(i0,", "Gather<axis=1>(i,"), last=[-1])).report.applied


def test_a_batched_product_times_one_is_that_product():
    """``baddbmm`` by TorchScript, which writes its alpha and beta."""
    text = (
        TOPK.format(k="l2")
        + """
        ls = Shape(l) z = ConstantOfShape(ls) p = ScatterElements<axis=1>(z, i, w) pt = Transpose<perm=[1, 0]>(p)
        h = MatMul(x, u) h1 = Mul(h, one) hb = Add(h1, ub) a = Relu(hb) o = MatMul(a, d) o1 = Mul(o, one)
        pc = Unsqueeze(pt, last) m = Mul(o1, pc) y = ReduceSum<keepdims=0>(m, l0)
    """
    )
    exact(block(text, last=[-1], one=np.float32(1)))


def test_one_expert_that_nothing_weighs_is_no_choice():
    text = BY_SCORE + "m = Equal(i, n0) f = Cast<to=1>(m) c = Unsqueeze(f, last) " + expert(0) + "y = Mul(o0, c)"
    declines(block(text, experts=1, last=[-1]), "there is one expert that nothing weighs")


def test_experts_in_halves_that_are_summed_in_floats_stay():
    text = ALL + "".join(
        f"s{e} = Gather<axis=-1>(p, l{e}) f{e} = Cast<to=1>(o{e}) t{e} = Mul(f{e}, s{e}) " for e in range(3)
    )
    text = text.replace("(x, u", "(xh, u") + "s = Add(t0, t1) y = Add(s, t2)"
    model = block("xh = Cast<to=10>(x) " + text)
    for tensor in model.graph.initializer:
        if tensor.name[0] in "ud" and tensor.data_type == onnx.TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    result = fuse(model)
    assert not any(decline.failed for decline in result.report.declines)
    declines(model, "the experts compute in FLOAT16 and are summed in FLOAT")

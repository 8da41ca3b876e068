"""fuse-experts: what stays apart says why, and the reason names the first thing that is not understood."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_fuse_experts import fuse
from test_fuse_others import TOPK, H, block, exact, expert, weighed

import rewriter
from rewriter.errors import ModelError

TESTS = Path(__file__).parents[1]
RECORD = json.loads((TESTS / "golden/fuse-experts.json").read_text(encoding="utf-8"))
FUSED = ("MoE", "QMoE")


@pytest.mark.parametrize("name", sorted(RECORD))
def test_every_block_of_the_tests_models_is_fused_or_has_a_decline(name):
    """As the record of what the rule does has it, beside what ``inspect`` counts."""
    (file,) = (TESTS / "models").glob(f"{name}.onnx")
    try:
        blocks = [block for block in rewriter.inspect(file).blocks if not block.form.startswith(FUSED)]
    except ModelError:
        return
    fused, declines = RECORD[name].get("applied", {}).get("fuse-experts", 0), RECORD[name].get("declines", [])
    assert fused >= len(blocks) or declines, blocks
    assert all(line.startswith("fuse-experts: ") and line.endswith("]") for line in declines)


def of(middle):
    """Three experts, the first of which has something between its projections."""
    text = TOPK.format(k="l2") + "".join(expert(e) for e in range(3)).replace("a0 = Relu(h0)", middle)
    return block(text + "".join(weighed(e, f"o{e}") for e in range(3)) + "s = Add(t0, t1) y = Add(s, t2)", last=[-1])


@pytest.mark.parametrize(
    ("middle", "named"),
    [
        ("f0 = Relu(h0) b0 = CumSum(f0, n1) c_ = Neg(b0) a0 = Relu(c_)", "CumSum"),  # and not what follows it
        ("f0 = Relu(h0) z0 = Shape(f0) b0 = CumSum(f0, n1) a0 = Expand(b0, z0)", "CumSum"),
    ],
)
def test_the_first_operator_that_is_not_understood_is_named(middle, named):
    ((_, reason),) = fuse(of(middle)).report.declined
    assert f"{named} does not belong to an expert as com.microsoft::MoE has it" in reason


def test_an_expert_that_an_if_decides_about_says_so():
    """``if rows.numel() > 0: out += ..`` as TorchScript scripts it."""
    text = TOPK.format(k="l2") + "xs = Shape(x) y0 = ConstantOfShape(xs) "
    text += "".join(expert(e) + weighed(e, f"o{e}") for e in range(3))
    model = block(text + "y = Add(y0, t2)", last=[-1])
    kept = [node for node in model.graph.node if not node.output[0].startswith(("t", "y")) or node.output[0] == "y0"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for e, out in enumerate(("y1", "y2", "y")):
        decides = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 18]> g (float[T, 8] y{e}, float[T, 1] q{e}, float[T, 8] o{e}) =>'
            f" (float[T, 8] {out}) {{ k{e} = ReduceMax<keepdims=0>(q{e}) z{e} = Sub(k{e}, k{e})"
            f" d_{e} = Greater(k{e}, z{e}) {out} = If (d_{e}) <"
            f" then_branch = a () => (float[T, 8] u{e}_) {{ t{e} = Mul(o{e}, q{e}) u{e}_ = Add(y{e}, t{e}) }},"
            f" else_branch = b () => (float[T, 8] v{e}_) {{ v{e}_ = Identity(y{e}) }}> }}"
        )
        model.graph.node.extend(decides.graph.node)
    result = fuse(model)
    assert not result.report.applied
    reason = "an If decides whether expert 0 is added"
    assert any(reason in why for _, why in result.report.declined), result.report.declined


LISTED = TOPK.format(k="l2") + "xs = Shape(x) y0 = ConstantOfShape(xs) wc = Unsqueeze(w, last) "
for _e in range(3):
    LISTED += (
        f"q{_e} = Equal(i, n{_e}) nz{_e} = NonZero(q{_e}) both{_e} = Transpose<perm=[1, 0]>(nz{_e}) "
        f"p{_e} = Slice(both{_e}, l0, far, l0, l1) r{_e} = Gather<axis=1>(p{_e}, n0) rc{_e} = Unsqueeze(r{_e}, last) "
        f"g{_e} = Gather(x, r{_e}) {expert(_e).replace('(x,', f'(g{_e},')} wr{_e} = GatherND(wc, p{_e}) "
        f't{_e} = Mul(o{_e}, wr{_e}) y{_e + 1 if _e < 2 else ""} = ScatterND<reduction="add">(y{_e}, rc{_e}, t{_e}) '
    )


def test_a_slice_that_takes_all_rows_is_none():
    """``nonzero(mask)[:, 0]`` as TorchScript writes it."""
    exact(block(LISTED, last=[-1], far=[2**63 - 1]))


ROUTED = "l = MatMul(x, r) v, i = TopK<axis=-1>(l, l2) "
CHOSEN = "wu = Gather(u, i) wd = Gather(d, i) x1 = Unsqueeze(x, l1) x2 = Unsqueeze(x1, l1) h = MatMul(x2, wu) "
CHOSEN += "a = Relu(h) o3 = MatMul(a, wd) o = Squeeze(o3, l2) wc = Unsqueeze(w, last) m = Mul(o, wc) "
SORTED = "w = Softmax<axis=-1>(v) f = Reshape(i, last) s = Shape(f) e, p = TopK<axis=0, largest=0>(f, s) "
SORTED += "t = Div(p, n2) g = Gather(x, t) g0, g1, g2 = Split<axis=0>(g, lengths) "
SORTED += "".join(expert(_e).replace("(x,", f"(g{_e},") for _e in range(3)) + "o = Concat<axis=0>(o0, o1, o2) "
SORTED += "wf = Reshape(w, last) ws = Gather(wf, p) wc = Unsqueeze(ws, last) m = Mul(o, wc) xs = Shape(x) "
SORTED += 'zs = ConstantOfShape(xs) tc = Unsqueeze(t, last) y = ScatterND<reduction="add">(zs, tc, m)'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ROUTED + SORTED, "the trace fixed how many rows each expert has: Split is by constants"),
        (
            ROUTED
            + "z = MatMul(x, rz) c = Concat<axis=-1>(v, z) p = Softmax<axis=-1>(c) w = Slice(p, l0, l2, l1) "
            + CHOSEN
            + "y = ReduceSum<keepdims=0>(m, l1)",
            "the weights of the chosen depend on other numbers too, which are put beside their scores",
        ),
        (
            "l = MatMul(x, r) p = Softmax<axis=-1>(l) i = ArgMax<axis=-1, keepdims=0>(p) hot = OneHot(i, n3, bits) "
            "at = CumSum(hot, n0) full = LessOrEqual(at, four) fc = Cast<to=7>(full) kept = Mul(hot, fc) "
            "kf = Cast<to=1>(kept) c = Mul(p, kf) " + "".join(expert(e) for e in range(3))
            + "".join(f"s{e} = Gather<axis=1>(c, l{e}) t{e} = Mul(o{e}, s{e}) " for e in range(3))
            + "q = Add(t0, t1) y = Add(q, t2)",
            "a CumSum numbers the tokens of each expert, as where a capacity drops some",
        ),
        (
            expert(0) + "l = MatMul(x, r) v, i = TopK<axis=-1>(l, l2) j = Mul(i, n2) w = Softmax<axis=-1>(v) "
            "du = Gather(tu, j) dd = Gather(td, j) xc = Unsqueeze(x, last) h3 = MatMul(du, xc) h = Squeeze(h3, last) "
            "a = Relu(h) b = Mul(a, w) b1 = Unsqueeze(b, l1) y3 = MatMul(b1, dd) y2 = Squeeze(y3, l1) y = Add(y2, o0)",
            "each is a row of a table that is gathered when it runs, and no matrix",
        ),
    ],
    ids=["rows split by constants", "a weight beside the chosen", "a capacity", "rows of a table"],
)  # fmt: skip
def test_the_true_obstacle_is_named(text, reason):
    table = np.random.default_rng(3).standard_normal((6, H)).astype(np.float32)
    held = {"tu": table, "td": table + 1, "rz": table[:1].T, "lengths": [2, 3, 5], "four": 4, "bits": [0, 1]}
    ((_, found),) = fuse(block(text, last=[-1], **held)).report.declined
    assert reason in found


def test_constants_are_no_reason():
    """TorchScript writes operands as Constant nodes; what is at fault reads them."""
    text = "z = Constant<value_int=2>() j = Mul(i, z) w = Softmax<axis=-1>(v) du = Gather(u, j) x1 = Unsqueeze(x, l1) "
    text += "x2 = Unsqueeze(x1, l1) h = MatMul(x2, du) a = Relu(h) dd = Gather(d, j) o3 = MatMul(a, dd) "
    text += "o = Squeeze(o3, l2) wc = Unsqueeze(w, last) m = Mul(o, wc) y = ReduceSum<keepdims=0>(m, l1)"
    ((_, found),) = fuse(block(ROUTED + text, last=[-1])).report.declined
    assert "Constant" not in found and "Mul" in found

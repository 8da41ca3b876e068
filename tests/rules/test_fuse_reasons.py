"""fuse-experts: what stays apart says why, and the reason names the first thing that is not understood."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
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


def test_an_expert_that_adds_its_input_to_its_output_says_so():
    text = TOPK.format(k="l2") + "".join(expert(e) + f"b{e} = Add(o{e}, x) " for e in range(3))
    model = block(text + "".join(weighed(e, f"b{e}") for e in range(3)) + "s = Add(t0, t1) y = Add(s, t2)", last=[-1])
    ((_, reason),) = fuse(model).report.declined
    assert "adds its input to its output" in reason


def test_a_stack_that_a_caller_may_give_is_named_with_a_remedy():
    text = "ug = Gather(u, i) x1 = Unsqueeze(x, l1) x2 = Unsqueeze(x1, l1) h = MatMul(x2, ug) a = Relu(h) "
    text += "dd = Gather(d, i) o3 = MatMul(a, dd) o = Squeeze(o3, l2) wc = Unsqueeze(w, last) m = Mul(o, wc) "
    model = block(TOPK.format(k="l2") + text + "y = ReduceSum<keepdims=0>(m, l1)", last=[-1])
    assert fuse(model).report.applied
    (stack,) = (tensor for tensor in model.graph.initializer if tensor.name == "u")
    model.graph.input.append(onnx.helper.make_tensor_value_info("u", stack.data_type, stack.dims))
    (decline,) = (decline for decline in fuse(model).report.declines if decline.rule == "fuse-experts")
    assert "'u' is not constant: a caller may override it" in decline.reason and decline.remedy


def test_constants_are_no_reason():
    """TorchScript writes operands as Constant nodes; what is at fault reads them."""
    text = "z = Constant<value_int=2>() j = Mul(i, z) w = Softmax<axis=-1>(v) du = Gather(u, j) x1 = Unsqueeze(x, l1) "
    text += "x2 = Unsqueeze(x1, l1) h = MatMul(x2, du) a = Relu(h) dd = Gather(d, j) o3 = MatMul(a, dd) "
    text += "o = Squeeze(o3, l2) wc = Unsqueeze(w, last) m = Mul(o, wc) y = ReduceSum<keepdims=0>(m, l1)"
    ((_, found),) = fuse(block(ROUTED + text, last=[-1])).report.declined
    assert "Constant" not in found and "Mul" in found


WEIGHED = "".join(weighed(e, f"o{e}") for e in range(3)) + "s = Add(t0, t1) y = Add(s, t2)"


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ("hb = MatMul(x, u0) la = MatMul(x, low) lb = MatMul(la, up) ls = Mul(lb, two) h0 = Add(hb, ls) a0 = Relu(h0) "
         "o0 = MatMul(a0, d0) ", "two more linears are added to a linear, as LoRA adapters are"),
        ("more = MatMul(low, up) wu = Add(u0, more) h0 = MatMul(x, wu) a0 = Relu(h0) o0 = MatMul(a0, d0) ",
         "a weight is computed from constants when the model runs"),
        ("o0 = own.Expert(x, u0, d0) ", "what a call of own::Expert computes is not looked into"),
    ],
    ids=["LoRA", "a weight that is computed", "a function"],
)  # fmt: skip
def test_what_is_to_be_folded_before_is_named_with_a_remedy(first, reason):
    rng = np.random.default_rng(2)
    held = {"low": rng.standard_normal((H, 2)).astype(np.float32), "up": rng.standard_normal((2, 6)).astype(np.float32)}
    text = TOPK.format(k="l2") + first + expert(1) + expert(2) + WEIGHED
    model = block(text, last=[-1], **held)
    if "own." in first:
        body = onnx.parser.parse_function(
            '<opset_import: ["" : 18], domain: "own"> Expert (x, u, d) => (o)'
            " { h = MatMul(x, u) a = Relu(h) o = MatMul(a, d) }"
        )
        model.functions.append(body)
        model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    (decline,) = (decline for decline in fuse(model).report.declines if decline.rule == "fuse-experts")
    assert reason in decline.reason and decline.remedy


def test_a_factor_that_would_round_weights_says_so():
    """In float16 the weight times it is another weight."""
    text = TOPK.format(k="l2") + "".join(expert(e) for e in range(3)).replace("o0 =", "e0 =") + "o0 = Mul(e0, two) "
    model = block(text + WEIGHED, last=[-1])
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.i = onnx.TensorProto.FLOAT16 if attribute.name == "to" else attribute.i
    ((_, found),) = fuse(model).report.declined
    assert "a factor for an expert would round its FLOAT16 weights" in found


@pytest.mark.parametrize("op_type", ["Loop", "Scan"])
def test_a_loop_over_the_experts_says_so(op_type):
    """One turn for each expert, in the body of the loop."""
    body = onnx.parser.parse_graph(
        f"body (int64 e, bool go, float[T, {H}] sum) => (bool on, float[T, {H}] more) {{ wu = Gather(u, e) "
        "wd = Gather(d, e) h = MatMul(x, wu) a = Relu(h) o = MatMul(a, wd) q = Equal(i, e) c = Cast<to=1>(q) "
        "p = Mul(c, w) s = ReduceSum(p, last) t = Mul(o, s) more = Add(sum, t) on = Identity(go) }"
    )
    model = block(
        TOPK.format(k="l2") + "zs = Shape(x) z = ConstantOfShape(zs) k = Cast<to=9>(n1) y = Add(z, x)", last=[-1]
    )
    del model.graph.node[-1]
    if op_type == "Loop":
        looped = onnx.helper.make_node("Loop", ["n3", "k", "z"], ["y"], body=body)
    else:
        del body.input[1], body.output[0], body.node[-1]
        body.input.append(body.input.pop(0))
        looped = onnx.helper.make_node("Scan", ["z", "each"], ["y"], body=body, num_scan_inputs=1)
    model.graph.node.append(looped)
    used = block("q = Gather(u, n3) p = Gather(d, n0) s = ReduceSum(q, last) y = Identity(x)", last=[-1])
    known = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(tensor for tensor in used.graph.initializer if tensor.name not in known)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(3), "each"))
    ((_, found),) = fuse(model).report.declined
    assert f"a {op_type} takes one expert at each turn" in found


CHOOSING = "l = MatMul(x, r) lt = Transpose<perm=[1, 0]>(l) v, i = TopK<axis=1>(lt, l2) xs = Shape(x) "
CHOOSING += "y0 = ConstantOfShape(xs) "
for _e in range(3):
    CHOOSING += (
        f"i{_e} = Gather(i, n{_e}) g{_e} = Gather(x, i{_e}) {expert(_e).replace('(x,', f'(g{_e},')} "
        f"v{_e} = Gather(v, n{_e}) c{_e} = Unsqueeze(v{_e}, last) t{_e} = Mul(o{_e}, c{_e}) "
        f"j{_e} = Unsqueeze(i{_e}, last) "
        f'y{_e + 1 if _e < 2 else ""} = ScatterND<reduction="add">(y{_e}, j{_e}, t{_e}) '
    )
SUMMED = "".join(expert(e) + weighed(e, f"o{e}") for e in range(3)) + "s = Add(t0, t1) y = Add(s, t2)"


def test_experts_that_choose_their_tokens_one_after_the_other_say_so():
    (decline,) = fuse(block(CHOOSING, last=[-1])).report.declines
    assert "the experts choose their tokens, and not each token its experts" in decline.reason and decline.remedy


@pytest.mark.parametrize("text", [SUMMED, CHOSEN + "y = ReduceSum<keepdims=0>(m, l1)"])
@pytest.mark.parametrize("given", ["overridden", "given", "computed"])
def test_a_number_of_experts_that_is_not_fixed_says_so(text, given):
    k = "l2" if given == "overridden" else "kk"
    inputs, cast = {"given": (", int64[1] kk", ""), "computed": (", float[1] kf", "kk = Cast<to=7>(kf) ")}.get(
        given, ("", "")
    )
    model = block(cast + TOPK.format(k=k) + text, last=[-1], inputs=inputs)
    if given == "overridden":
        model.graph.input.append(onnx.helper.make_tensor_value_info("l2", onnx.TensorProto.INT64, [1]))
    (decline,) = fuse(model).report.declines
    assert f"how many experts a token gets is not fixed: '{k}' is not constant" in decline.reason and decline.remedy
    assert ("a caller may override it" in decline.reason) == (given == "overridden")


def test_an_if_that_always_takes_one_branch_is_to_be_folded():
    """``scatter_reduce`` as TorchScript writes it, which asks for the rank when the model runs."""
    text = TOPK.format(k="l2") + "ls = Shape(l) z = ConstantOfShape(ls) zs = Shape(z) rank = Size(zs) "
    text += 'scalar = Equal(rank, n0) wb = Identity(w) p = ScatterElements<axis=1, reduction="add">(z, i, wb) '
    text += "".join(
        f"{expert(e)} s{e} = Gather<axis=1>(p, n{e}) q{e} = Unsqueeze(s{e}, last) t{e} = Mul(o{e}, q{e}) "
        for e in range(3)
    )
    model = block(text + "s = Add(t0, t1) y = Add(s, t2)", last=[-1])
    exact(model)
    decides = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (bool scalar, float[T, 2] w) => (float[T, 2] wb) {'
        " wb = If (scalar) <then_branch = a () => (float[N] flat) { one = Constant<value_ints = [-1]> ()"
        " flat = Reshape(w, one) }, else_branch = b () => (float[T, 2] same) { same = Identity(w) }> }"
    )
    (at,) = (i for i, node in enumerate(model.graph.node) if node.output[0] == "wb")
    model.graph.node[at].CopyFrom(decides.graph.node[0])
    (decline,) = fuse(model).report.declines
    assert "an If stands there whose condition is the same for every input" in decline.reason
    assert "onnxscript.optimizer.optimize" in decline.remedy
    folded = ir.from_proto(model)
    onnxscript.optimizer.optimize(folded)
    exact(ir.to_proto(folded))

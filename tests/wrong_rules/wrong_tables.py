"""Wrong versions of the rules on embeddings, gathered stacks and attention projections."""

from __future__ import annotations

import numpy as np
from embedding_models import normal
from mistakes import Mistake
from shown import ruled, texts

GATHER, TIE, SHARE = "gather-to-gather-block-quantized", "tie-quantized-embedding", "share-tied-embedding"
PACK, UNPACK = "pack-qkv", "unpack-qkv"
TIED, LAYOUT = "rules/blocks/tied.py", "rewriter/operators/layout/stored.py"

small = {"min_bytes": 0}
always = ruled({UNPACK: {"when": "always"}})
asymmetric = {"symmetric": False, "block_size": 16}

_table = texts(("(int64[t] ids) => (float[t, 64] y) { y = Gather(w, ids) }", {"w": normal(50, 64)}))
_columns = texts(("(int64[t] ids) => (float[50, t] y) { y = Gather<axis = 1>(w, ids) }", {"w": normal(50, 64)}))
_stack = texts(
    (
        """(int64[t] ids, float[t, 1, 32] x) => (float[t, 1, 32] y)
        { g = Gather(w, ids) y = MatMul(x, g) }""",
        {"w": normal(3, 32, 32)},
    )
)
_stack_also_read = texts(
    (
        """(int64[t] ids, float[t, 1, 32] x) => (float[t, 1, 32] y)
        { g = Gather(w, ids) m = MatMul(x, g) most = ReduceMax<keepdims = 0>(w) y = Mul(m, most) }""",
        {"w": normal(3, 32, 32)},
    )
)
_batches = texts(
    (
        "(int64[3, 1] i, float[3, 32, 1] x) => (float[3, n, 1] y) { g = GatherND<batch_dims = 1>(w, i) y = Add(g, x) }",
        {"w": normal(3, 3, 32)},
    )
)

TABLE = normal(48, 32)
_equal = texts(
    *(
        (f"(int64[s] ids) => (float[s, 48] y) {{ e = Gather(w, ids) h = Relu(e) {head} }}", {"w": TABLE, "t": second})
        for head, second in (
            ("y = MatMul(h, t)", np.ascontiguousarray(TABLE.T)),
            ("y = Gemm<transB = 1>(h, t)", TABLE.copy()),
        )
    )
)
_square = texts(
    (
        "(int64[s] ids) => (float[s, 32] y) { e = Gather(w, ids) h = Relu(e) y = MatMul(h, t) }",
        {"w": TABLE[:32], "t": np.ascontiguousarray(TABLE[:32].T)},
    ),
    (
        "(int64[s] ids) => (float[s, 32] y) { e = Gather(w, ids) h = Relu(e) y = MatMul(h, w) }",
        {"w": TABLE[:32]},
    ),
)
_unequal = texts(
    (
        "(int64[s] ids) => (float[s, 48] y) { e = Gather(w, ids) h = Relu(e) y = MatMul(h, t) }",
        {"w": TABLE, "t": np.ascontiguousarray(TABLE[::-1].T)},
    )
)
_scaled = texts(
    (
        "(int64[s] ids) => (float[s, 48] y) { e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1, alpha = 0.5>(h, t) }",
        {"w": TABLE, "t": TABLE.copy()},
    )
)
_biased = texts(
    (
        "(int64[s] ids) => (float[s, 48] y) { e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w, b) }",
        {"w": TABLE, "b": normal(48)},
    )
)


def _attended(linears, lengths=(8, 8, 8), **weights):
    text = f"""(float[1, s, 32] x) => (float[1, s, {lengths[2]}] y) {{ {linears}
        r = Transpose<perm = [0, 2, 1]>(k) t = MatMul(q, r) p = Softmax(t) y = MatMul(p, v) }}"""
    q, k, v = lengths
    stored = {"wq": normal(32, q), "wk": normal(32, k, seed=1), "wv": normal(32, v, seed=2), "w": normal(32, q + k + v)}
    stored |= {
        "bq": normal(q, seed=3),
        "bk": normal(k, seed=4),
        "bv": normal(v, seed=5),
        "b": normal(q + k + v, seed=6),
    }
    stored |= {"lengths": np.array(lengths)} | weights
    return text, {name: array for name, array in stored.items() if f"{name})" in text or f"({name}" in text}


_MATMULS = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
_BIASED = "a = MatMul(x, wq) q = Add(a, bq) c = MatMul(x, wk) k = Add(c, bk) e = MatMul(x, wv) v = Add(e, bv)"
_SOME_BIASED = "a = MatMul(x, wq) q = Add(a, bq) k = MatMul(x, wk) v = MatMul(x, wv)"
_SPLIT = "z = MatMul(x, w) q, k, v = Split<axis = -1>(z, lengths)"
_BIAS_SPLIT = "m = MatMul(x, w) z = Add(m, b) q, k, v = Split<axis = -1>(z, lengths)"

_apart = texts(_attended(_MATMULS), _attended(_BIASED))
_biased_apart = texts(_attended(_BIASED))
_packed = texts(_attended(_SPLIT), _attended(_BIAS_SPLIT))
_biased_packed = texts(_attended(_BIAS_SPLIT))

TABLES = (
    Mistake(
        GATHER,
        "a stack that something else reads too",
        "rules/gather_to_gather_block_quantized.py",
        [("if not reads_rows(use):", "if False:")],
        _stack_also_read,
    ),
    Mistake(
        GATHER,
        "quantized along the wrong axis",
        "rules/blocks/gather_block_quantized.py",
        [('"quantize_axis": axis', '"quantize_axis": 0')],
        _table,
    ),
    Mistake(
        GATHER,
        "low and high nibble swapped",
        LAYOUT,
        [
            ("return pack_codes(codes, bits)", "return (lambda p: p << 4 | p >> 4)(pack_codes(codes, bits))"),
            ("return unpack_codes(packed, shape", "return unpack_codes(packed << 4 | packed >> 4, shape"),
        ],
        _table,
    ),
    Mistake(
        GATHER,
        "signed zero point by default",
        LAYOUT,
        [
            ("return pack_codes(codes, bits)", "return pack_codes(codes ^ 8, bits)"),
            ("            self.unpack_codes(codes),\n", "            self.unpack_codes(codes) ^ 8,\n"),
        ],
        _table,
    ),
    Mistake(
        GATHER,
        "transposed square weight",
        "rules/gather_to_gather_block_quantized.py",
        [("return gathered if rows.perm is None else", "return gathered if rows.perm else")],
        _stack,
    ),
    Mistake(
        GATHER,
        "wrong Gather axis",
        "rules/gather_to_gather_block_quantized.py",
        [
            ('if node.op_type == "Gather" and integer_attribute(node, "axis", 0) % view.rank:', "if False:"),
            ("        if not reads_rows(use):", "        if False:"),
        ],
        _columns,
    ),
    Mistake(
        GATHER,
        "the first expert for all",
        "rules/gather_to_gather_block_quantized.py",
        [("[view.index(0, e) for e in range(view.shape[0])]", "[view.index(0, 0) for e in range(view.shape[0])]")],
        _stack,
    ),
    Mistake(
        GATHER,
        "zero points not passed on",
        "rules/gather_to_gather_block_quantized.py",
        [("gather(op, data, ids, others,", "gather(op, data, ids, others[:1],")],
        _table,
        ruled(GATHER, **asymmetric),
    ),
    Mistake(
        TIE,
        "two unequal tables tied",
        TIED,
        [("if same_elements(own, table):", "if own.shape == table.shape:")],
        _unequal,
        ruled({TIE: small}),
    ),
    Mistake(
        TIE,
        "transposed square weight",
        TIED,
        [('"transB", 0) else view.T', '"transB", 0) else view')],
        _square,
        ruled({TIE: small}),
    ),
    Mistake(
        TIE,
        "bias of the output projection lost",
        "rules/tie_quantized_embedding.py",
        [
            ("new[head.outputs[0]] = product if c is bias else op.Add(product, c)", "new[head.outputs[0]] = product"),
            ("bias = c if c is not None and takes_bias", "bias = c if False and takes_bias"),
        ],
        _biased,
        ruled({TIE: small}),
    ),
    Mistake(
        TIE,
        "zero points of blocks in packed bytes",
        "rules/tie_quantized_embedding.py",
        [("return not spec.symmetric and spec.bits < 8", "return False")],
        _equal,
        ruled({TIE: small}, symmetric=False, block_size=16),
    ),
    Mistake(
        TIE,
        "scales of the gather along the wrong axis",
        "rules/tie_quantized_embedding.py",
        [("[v, h // spec.block_size, 1],", "[v, 1, h // spec.block_size],")],
        _equal,
        ruled({TIE: small}, block_size=16),
    ),
    Mistake(
        SHARE,
        "two unequal tables tied",
        TIED,
        [("if same_elements(own, table):", "if own.shape == table.shape:")],
        _unequal,
        ruled({SHARE: small}),
    ),
    Mistake(
        SHARE,
        "transposed square weight",
        "rules/share_tied_embedding.py",
        [("table.view if by_rows else table.view.T", "table.view")],
        _square,
        ruled({SHARE: small}),
    ),
    Mistake(
        SHARE,
        "attributes of the output projection lost",
        "rules/share_tied_embedding.py",
        [
            (
                "op.Gemm(*inputs, **{a.name: a.value for a in head.attributes.values()})",
                "op.Gemm(*inputs, transB=by_rows)",
            )
        ],
        _scaled,
        ruled({SHARE: small}),
    ),
    Mistake(
        PACK,
        "row order q, v, k",
        "rules/pack_qkv.py",
        [
            (
                "joined([p.operands[slot][0] for p in three], axis,",
                "joined([three[i].operands[slot][0] for i in (0, 2, 1)], axis,",
            )
        ],
        _apart,
    ),
    Mistake(
        PACK,
        "biases of another order than their rows",
        "rules/pack_qkv.py",
        [("joined(shown, first.bias[2],", "joined(shown[::-1], first.bias[2],")],
        _biased_apart,
    ),
    Mistake(
        PACK,
        "bias of q for none",
        "rules/pack_qkv.py",
        [("if other.form != q.form:", "if other.form[:2] != q.form[:2]:")],
        texts(_attended(_SOME_BIASED)),
    ),
    Mistake(
        PACK,
        "split in thirds",
        "rules/pack_qkv.py",
        [('[p.n for p in three], "lengths"', '[sum(p.n for p in three) // 3] * 3, "lengths"')],
        texts(_attended(_MATMULS, (8, 8, 14))),
    ),
    Mistake(
        UNPACK,
        "k and v swapped",
        "rules/unpack_qkv.py",
        [
            (
                "new = dict(zip(packed.outs, outs, strict=True))",
                "new = dict(zip(packed.outs, (outs[0], outs[2], outs[1]), strict=True))",
            )
        ],
        _packed,
        always,
    ),
    Mistake(
        UNPACK,
        "q for each of the three",
        "rules/unpack_qkv.py",
        [("start += n", "start += 0")],
        _packed,
        always,
    ),
    Mistake(
        UNPACK,
        "bias cut at its beginning for each",
        "rules/unpack_qkv.py",
        [
            (
                'view.slice(axis, start, n)), name=f"{view.name}_{letter}")\n            product',
                'view.slice(axis, 0, n)), name=f"{view.name}_{letter}")\n            product',
            )
        ],
        _biased_packed,
        always,
    ),
)

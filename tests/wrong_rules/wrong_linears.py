"""Wrong versions of the rules on linear layers: unstack, to MatMulNBits, and between its layouts."""

from __future__ import annotations

from functools import partial

import numpy as np
from embedding_models import normal
from mistakes import Mistake
from rule_models import MODELS
from shown import quantized_texts, ruled, texts

from rewriter.testing import projections, unrolled_experts

MOVES = "rewriter/facts/moves.py"
MATMUL_NBITS, EMIT = "rules/blocks/matmul_nbits.py", "rewriter/emit.py"
STORED = "rewriter/operators/layout/stored.py"

UNSTACK, MATMUL, GEMM = "unstack", "matmul-to-matmul-nbits", "gemm-to-matmul-nbits"
LAYOUT, EINSUM = "matmul-nbits-layout", "einsum-to-matmul"

plain = {"placements": ["main"], "max_size": 4, "typed": True}


def _selected(**narrowed):
    return lambda: unrolled_experts(**{"obstacles": [], **plain, **narrowed})


def _multiplied(**narrowed):
    return lambda: projections(**{**plain, "max_size": 40, **narrowed})


_gemms = partial(_multiplied, consumers=["gemm", "gemm-bias", "gemm-scaled", "gemm-transA"])
_asymmetric = ruled(MATMUL, symmetric=False, block_size=16)
_raw = quantized_texts(
    ruled(MATMUL, block_size=32),
    ("(float16[t, 128] x) => (float16[t, n] y) { y = MatMul(x, w) }", {"w": normal(128, 64).astype(np.float16)}),
    ("(float16[t, 64] x) => (float16[t, n] y) { y = MatMul(x, w) }", {"w": normal(64, 64).astype(np.float16)}),
)

_two = texts(
    (
        "(float[t, 40] x) => (float[t, n] y) { a = MatMul(x, v) b = MatMul(x, w) y = Sub(a, b) }",
        {"v": normal(40, 24), "w": normal(40, 24, seed=1)},
    )
)
_with_bias = texts(
    ("(float[t, 40] x) => (float[t, n] y) { y = Gemm(x, w, b) }", {"w": normal(40, 24), "b": normal(24)}),
)
_batched = texts(("(float[3, t, 32] x) => (float[3, t, 16] y) { y = MatMul(x, w) }", {"w": normal(3, 32, 16)}))
_alone = texts(("(float[1, t, 32] x) => (float[3, t, 16] y) { y = MatMul(x, w) }", {"w": normal(3, 32, 16)}))
_long = texts(("(float[t, 40] x) => (float[t, n] y) { y = MatMul(x, w) }", {"w": normal(40, 24)}))


def _einsum(equation, x, y, *w):
    return texts((f'(float[{x}] x) => (float[{y}] y) {{ y = Einsum<equation="{equation}">(x, w) }}', {"w": normal(*w)}))


LINEARS = (
    Mistake(
        UNSTACK,
        "slices of a stack that is still read whole",
        "rules/unstack.py",
        [("if readers.whole is not None:", "if False:"), ("if stored is not None and readers", "if False and readers")],
        _selected(obstacles=["stack-read-whole", "stack-is-output"], max_experts=2, selections=["gather"]),
    ),
    Mistake(
        UNSTACK,
        "off-by-one expert",
        MOVES,
        [("return (Take(axis, where[0]),)", "return (Take(axis, (where[0] + 1) % extent),)")],
        _selected(),
    ),
    Mistake(
        UNSTACK,
        "transposed square weight",
        MOVES,
        [("range(len(dims))[::-1])", "range(len(dims)))")],
        _selected(),
    ),
    Mistake(
        UNSTACK,
        "wrong Gather axis",
        MOVES,
        [
            (
                'axis = integer_attribute(node, "axis", 0) % len(dims)\n    indices = facts',
                "axis = 0\n    indices = facts",
            )
        ],
        _selected(),
    ),
    Mistake(
        UNSTACK,
        "a Split's parts counted from one",
        MOVES,
        [
            (
                "return dict(zip(node.outputs, _cuts(axis, lengths), strict=True))",
                "return dict(zip(node.outputs, [*_cuts(axis, lengths)[1:], *_cuts(axis, lengths)[:1]], strict=True))",
            )
        ],
        _selected(selections=["split"]),
    ),
    Mistake(
        MATMUL,
        "transposed square weight",
        MATMUL_NBITS,
        [("matrix if transposed else matrix.T, reader", "matrix, reader")],
        lambda: MODELS[MATMUL],
    ),
    Mistake(
        MATMUL,
        "absolute scales",
        STORED,
        [("scales = as_shape(weight.scales,", "scales = as_shape(abs(weight.scales),")],
        lambda: MODELS[MATMUL],
    ),
    Mistake(
        MATMUL,
        "absolute scales out of the quantizer",
        "rewriter/quantize/rows.py",
        [("put(exact, scales[rows])", "put(np.abs(exact), scales[rows])")],
        lambda: MODELS[MATMUL],
    ),
    Mistake(
        MATMUL,
        "a wrong zero point",
        "rewriter/quantize/rows.py",
        [("None if spec.symmetric else zeros, spec.bits", "None if spec.symmetric else zeros ^ 1, spec.bits")],
        lambda: MODELS[MATMUL],
        _asymmetric,
    ),
    Mistake(
        MATMUL,
        "zero points not passed on",
        EMIT,
        [("[x, *weight]", "[x, *weight[:2]]")],
        lambda: MODELS[MATMUL],
        _asymmetric,
    ),
    Mistake(
        MATMUL,
        "signed zero point by default",
        STORED,
        [("            self.unpack_codes(codes),\n", "            self.unpack_codes(codes) ^ 8,\n")],
        lambda: MODELS[MATMUL],
    ),
    Mistake(
        MATMUL,
        "low and high nibble swapped",
        STORED,
        [
            ("return pack_codes(codes, bits)", "return (lambda p: p << 4 | p >> 4)(pack_codes(codes, bits))"),
            ("return unpack_codes(packed, shape", "return unpack_codes(packed << 4 | packed >> 4, shape"),
        ],
        lambda: MODELS[MATMUL],
    ),
    Mistake(
        MATMUL,
        "zero points packed high bits first",
        STORED,
        [
            (
                "pack_codes(rows, self.shape.bits, pad=default_zero_point(self.shape.bits))",
                "pack_codes(rows[:, ::-1], self.shape.bits, pad=default_zero_point(self.shape.bits))",
            ),
            (
                "unpack_codes(packed, shape.bits, self.scales[-1])",
                "unpack_codes(packed, shape.bits, self.scales[-1])[:, ::-1]",
            ),
        ],
        _long,
        _asymmetric,
    ),
    Mistake(
        MATMUL,
        "block size left at its default",
        EMIT,
        [('"block_size": spec.block_size}', '"block_size": 32}')],
        lambda: MODELS[MATMUL],
        _asymmetric,
    ),
    Mistake(
        MATMUL,
        "K padded in front",
        STORED,
        [("((0, 0), (0, padding // self.shape.n))", "((0, 0), (padding // self.shape.n, 0))")],
        lambda: MODELS[MATMUL],
    ),
    Mistake(
        MATMUL,
        "K rounded up to whole blocks",
        EMIT,
        [('{"K": k,', '{"K": -(-k // spec.block_size) * spec.block_size,')],
        lambda: MODELS[MATMUL],
    ),
    Mistake(
        MATMUL,
        "float32 scales under float16",
        "rewriter/engine/context.py",
        [
            (
                "given[1] if len(given) > 1 else weight.dtype.numpy()",
                "given[1] if len(given) > 1 else ir.DataType.FLOAT.numpy()",
            )
        ],
        _multiplied(dtypes=["float16"]),
    ),
    Mistake(
        MATMUL,
        "rank of the product lost",
        MATMUL_NBITS,
        [("if view.rank > 2 and (x.shape is None or x.shape.rank() < view.rank):", "if False:")],
        _multiplied(consumers=["matmul"]),
    ),
    Mistake(
        MATMUL,
        "stale shared tensor",
        "rewriter/quantize/job.py",
        [("return (self.weight, self.context.spec,", "return (self.shape, self.context.spec,")],
        _two,
    ),
    Mistake(
        MATMUL,
        "a weight that something else reads too",
        MATMUL_NBITS,
        [("if use.node is not reader or use.idx != 1:", "if False:")],
        _multiplied(consumers=["matmul"], obstacles=["weight-also-read"]),
    ),
    Mistake(
        GEMM,
        "bias lost",
        "rules/gemm_to_matmul_nbits.py",
        [("job, bias=bias, accuracy_level", "job, accuracy_level")],
        _with_bias,
    ),
    Mistake(
        GEMM,
        "transB taken as set",
        "rules/gemm_to_matmul_nbits.py",
        [('integer_attribute(node, "transB", 0)', 'integer_attribute(node, "transB", 1)')],
        _gemms(),
    ),
    Mistake(
        GEMM,
        "a bias of another shape given to the operator",
        MATMUL_NBITS,
        [("c.shape.dims == (n,)", "True")],
        _gemms(consumers=["gemm-bias"]),
    ),
    Mistake(
        "unbatch",
        "the first expert for all",
        "rules/unbatch.py",
        [("[stack.index(0, e) for e in", "[stack.index(0, 0) for e in")],
        _batched,
    ),
    Mistake(
        "unbatch",
        "the first expert's rows for all",
        "rules/unbatch.py",
        [('_integers(op, [e], "expert")', '_integers(op, [0], "expert")')],
        _batched,
    ),
    Mistake(
        "unbatch",
        "the model's own rows made to fit",
        "rules/unbatch.py",
        [("            own = rows\n", "            own = rows; own.shape = ir.Shape(row_shape)\n")],
        _alone,
    ),
    Mistake(
        EINSUM,
        "transposed square weight",
        "rules/einsum_to_matmul.py",
        [
            (
                "[product.w.index(letter) for letter in product.batch + product.inner + product.columns]",
                "range(view.rank)",
            )
        ],
        _einsum("th,ih->ti", "t, 32", "t, 32", 32, 32),
    ),
    Mistake(
        EINSUM,
        "the result left in the order of the product",
        "rules/einsum_to_matmul.py",
        [("_arranged(op, out, lead + product.columns, product.out)", "out")],
        _einsum("th,hnd->ntd", "t, 32", "4, t, 4", 32, 4, 4),
    ),
    Mistake(
        EINSUM,
        "heads summed in the order of the weight",
        "rules/einsum_to_matmul.py",
        [("_arranged(op, x, product.x, lead + product.inner)", "x")],
        _einsum("dtn,ndh->th", "4, t, 4", "t, 24", 4, 4, 24),
    ),
    Mistake(
        EINSUM,
        "an input that is repeated along what is summed",
        "rules/einsum_to_matmul.py",
        [("size.constant != sizes[letter]", "False")],
        _einsum("th,hi->ti", "t, 1", "t, 24", 32, 24),
    ),
    Mistake(
        LAYOUT,
        "codes not taken out of the raw layout",
        "rules/matmul_nbits_layout.py",
        [("old.unpack_codes(stored)", "stored.reshape(n, -1)")],
        _raw,
        ruled({LAYOUT: {"layout": "cutlass-sm80"}}, target="cuda:sm80"),
    ),
    Mistake(
        LAYOUT,
        "laid out for another architecture",
        "rules/matmul_nbits_layout.py",
        [("new.pack_codes(old", "LAYOUTS[2].require(shape).pack_codes(old")],
        _raw,
        ruled({LAYOUT: {"layout": "cutlass-sm80"}}, target="cuda"),
    ),
    Mistake(
        LAYOUT,
        "the new layout not named",
        "rules/matmul_nbits_layout.py",
        [("        if wanted is not RAW:\n", "        if wanted is before:\n")],
        _raw,
        ruled({LAYOUT: {"layout": "cutlass-sm80"}}, target="cuda:sm80"),
    ),
)

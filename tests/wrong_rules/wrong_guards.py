"""Wrong versions in which a guard is gone: ``near_misses`` must find the fact that it is there for."""

from __future__ import annotations

from functools import partial

import numpy as np
from embedding_models import normal
from mistakes import Mistake
from shown import FUSED, blocks, qmoes, ruled, texts

gone = partial(Mistake, guard=True)
MATMUL_NBITS, TIED = "rules/blocks/matmul_nbits.py", "rules/blocks/tied.py"
CONSTANT = "rewriter/tensors/constant.py"

_gemm = texts(("(float[t, 40] x) => (float[t, 24] y) { y = Gemm(x, w, b) }", {"w": normal(40, 24), "b": normal(24)}))
_square = texts(("(float[24, 24] x) => (float[24, 24] y) { y = Gemm(x, w) }", {"w": normal(24, 24)}))
_matmul = texts(("(float[t, 40] x) => (float[t, 24] y) { y = MatMul(x, w) }", {"w": normal(40, 24)}))
_stack = texts(
    (
        "(float[t, 8] x) => (float[t, 8] y) { g = Gather(w, i) y = MatMul(x, g) }",
        {"w": normal(3, 8, 8), "i": np.array(1)},
    )
)
_tied = texts(
    (
        "(int64[s] ids) => (float[s, 48] y) { e = Gather(w, ids) h = Relu(e) y = MatMul(h, t) }",
        {"w": normal(48, 32), "t": np.ascontiguousarray(normal(48, 32).T)},
    )
)

_block = partial(blocks, hidden=4, inter=4, experts=2, k=1)
_overridable = [("if value.is_graph_input():", "if False:")]
_unequal = [("if same_elements(own, table):", "if own.shape == table.shape:")]

GUARDS = (
    gone(
        "gemm-to-matmul-nbits",
        "alpha ignored",
        MATMUL_NBITS,
        [('"alpha", 1.0)) != 1.0:', '"alpha", 1.0)) == 0.0:')],
        _gemm,
    ),
    gone(
        "gemm-to-matmul-nbits",
        "beta ignored",
        MATMUL_NBITS,
        [('"beta", 1.0)) != 1.0:', '"beta", 1.0)) == 0.0:')],
        _gemm,
    ),
    gone(
        "gemm-to-matmul-nbits",
        "transA ignored",
        MATMUL_NBITS,
        [('if integer_attribute(node, "transA", 0):', "if False:")],
        _square,
    ),
    gone("matmul-to-matmul-nbits", "an overridable initializer taken for a constant", CONSTANT, _overridable, _matmul),
    gone("unstack", "an overridable initializer taken for a constant", CONSTANT, _overridable, _stack),
    gone(
        "fuse-experts",
        "Softmax over another axis than the experts",
        "rules/blocks/routers.py",
        [("axis % len(dims) != len(dims) - 1", "not len(dims)")],
        _block(),
    ),
    gone(
        "fuse-experts",
        "Gelu by erf taken for the one by tanh",
        "rules/blocks/activations.py",
        [('node.op_type != "Gelu" else "Gelu(erf)"', 'node.op_type != "Gelu" else "gelu"')],
        _block(activation="gelu"),
    ),
    gone(
        "share-tied-embedding",
        "tables compared by their shapes",
        TIED,
        _unequal,
        _tied,
        ruled({"share-tied-embedding": {"min_bytes": 0}}),
    ),
    gone(
        "tie-quantized-embedding",
        "tables compared by their shapes",
        TIED,
        _unequal,
        _tied,
        ruled({"tie-quantized-embedding": {"min_bytes": 0}}),
    ),
    gone(
        "qmoe-to-moe",
        "any router_weights taken for the logits' softmax",
        "rules/qmoe_to_moe.py",
        [("    if weights is None:\n        return\n", "    if weights is not None:\n        return\n")],
        qmoes(attributes=FUSED | {"normalize_routing_weights": 0}),
    ),
)

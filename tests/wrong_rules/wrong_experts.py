"""Wrong versions of the rule that fuses a block of experts, float ones and quantized ones."""

from __future__ import annotations

from mistakes import Mistake
from rule_models import MODELS
from shown import blocks, quantized_blocks, ruled

FUSE, FORMER = "fuse-experts", "fuse-quantized-experts"
RULE, BLOCK, FUSED = "rules/fuse_experts.py", "rules/blocks/block.py", "rules/blocks/emit.py"
FLOAT, QUANTIZED = "rules/blocks/float_weights.py", "rules/blocks/quantized_weights.py"
CLASSIFY, ROUTERS = "rules/blocks/classify.py", "rules/blocks/routers.py"
ROUTING, WEIGHTS = "rules/blocks/routing.py", "rules/blocks/routing_weights.py"


def _layers():
    return MODELS[FUSE]


EXPERTS = (
    Mistake(
        FUSE,
        "swapped gate and up",
        FLOAT,
        [("fc1 = interleaved(gate, up)", "fc1 = interleaved(up, gate)")],
        _layers,
    ),
    Mistake(
        FUSE,
        "a wrong interleave: halves one after another",
        "rewriter/tensors/stack.py",
        [("StackedCopy((first, second), 2, name)", "StackedCopy((first, second), 1, name)")],
        blocks(weights="own"),
    ),
    Mistake(
        FUSE,
        "a lost expert",
        BLOCK,
        [
            (
                'raise Declined(f"expert {expert} of {router.experts} is missing", _last(mixed).node,'
                " remedy=WHOLE_BLOCK)",
                "continue",
            ),
            ("None if everyone else tuple(found)", "None"),
        ],
        blocks(broken="missing"),
    ),
    Mistake(
        FUSE,
        "an expert mixed in twice counted once",
        BLOCK,
        [("if counted & term.slots:", "if False:")],
        blocks(broken="doubled"),
    ),
    Mistake(
        FUSE,
        "off-by-one expert",
        "rules/blocks/contents.py",
        [("return Dense(self.view.index(0, position))", "return Dense(self.view.index(0, position - (position > 0)))")],
        blocks(combine=["chosen", "dense"]),
    ),
    Mistake(
        FUSE,
        "experts in the order in which they are added",
        BLOCK,
        [("found = dict(sorted(found.items()))", "found = dict(found)")],
        blocks(combine=["slots", "mask-sum"]),
    ),
    Mistake(
        FUSE,
        "outputs side by side taken in another order",
        "rules/blocks/grouped.py",
        [('joined(held, "all")', 'joined(held[::-1], "all")')],
        blocks(combine=["joined-sum", "joined-matmul", "joined-einsum"]),
    ),
    Mistake(
        FUSE,
        "another expert's input",
        BLOCK,
        [("if output.gate.x is not leading.gate.x:", "if False:")],
        blocks(broken="other-input"),
    ),
    Mistake(
        FUSE,
        "k of the usual two",
        FUSED,
        [("k=block.k,", "k=2,")],
        blocks(k=[1, 3]),
    ),
    Mistake(
        FUSE,
        "weights always normalised",
        FUSED,
        [("normalize=routing.normalize,", "normalize=True,")],
        _layers,
    ),
    Mistake(
        FUSE,
        "a graph output in the middle",
        "rules/blocks/matched_nodes.py",
        [
            (
                "            if value.is_graph_output():\n                raise Declined(f\"'",
                "            if False:\n                raise Declined(f\"'",
            )
        ],
        blocks(broken="inner-output"),
    ),
    Mistake(
        FUSE,
        "geglu with gate and linear swapped",
        CLASSIFY,
        [("return Activated(known), gate.linear, up.linear", "return Activated(known), up.linear, gate.linear")],
        blocks(activation="geglu"),
        ruled(FUSE, target="cuda@1.32"),
    ),
    Mistake(
        FUSE,
        "the square of relu taken for relu",
        CLASSIFY,
        [("[first] * known.power:", "[first] * len(factors):")],
        blocks(activation="squared"),
        ruled(FUSE, target="cuda@1.32"),
    ),
    Mistake(
        FUSE,
        "a factor for all experts of halves lost",
        FLOAT,
        [("factors * mixing.scale, replace", "factors, replace")],
        blocks(router="scaled", dtype="float16", hidden=32, inter=32),
        ruled({FUSE: {"into": "QMoE"}}, "moe-to-qmoe"),
    ),
    Mistake(
        FUSE,
        "another reader in the middle",
        "rules/blocks/matched_nodes.py",
        [("if use.node not in nodes:", "if False:")],
        blocks(broken="inner-read"),
    ),
    Mistake(
        FUSE,
        "a factor for each expert lost",
        FLOAT,
        [("np.ones(len(block.experts)) if mixing.table is None else", "np.ones(len(block.experts)) if True else")],
        blocks(router="table"),
    ),
    Mistake(
        FUSE,
        "a factor for each expert not on the bias of down",
        FLOAT,
        [("bias = None if fc2_bias is None else scaled(fc2_bias, numbers)", "bias = fc2_bias")],
        blocks(router="table", bias=True),
    ),
    Mistake(
        FUSE,
        "a factor for all experts lost",
        FUSED,
        [("    if scale != 1:\n        out = op.Mul", "    if scale == 0:\n        out = op.Mul")],
        blocks(router="scaled"),
    ),
    Mistake(
        FUSE,
        "bias of gate and up on the other half",
        FLOAT,
        [("interleaved(gate_bias or _zeros(gate), up_bias", "interleaved(up_bias or _zeros(gate), gate_bias")],
        blocks(bias=True, halves=["split", "apart"]),
    ),
    Mistake(
        FUSE,
        "bias of down lost",
        FLOAT,
        [("return (fc1, fc1_bias, fc2, fc2_bias), block", "return (fc1, fc1_bias, fc2, None), block")],
        blocks(bias=True),
    ),
    Mistake(
        FUSE,
        "SwiGLU's alpha taken for 1",
        FUSED,
        [("alpha=activation.alpha,", "alpha=1.0,")],
        blocks(activation="clamped"),
    ),
    Mistake(
        FUSE,
        "SwiGLU's limit lost",
        FUSED,
        [("limit=math.inf if activation.limit is None else activation.limit,", "limit=math.inf,")],
        blocks(activation="clamped"),
    ),
    Mistake(
        FUSE,
        "SwiGLU's uneven limit taken for an even one",
        CLASSIFY,
        [('steps[0] != ("clip", -limit, limit)', "steps[0][2] != limit")],
        blocks(activation="clamped", broken="uneven-limit"),
    ),
    Mistake(
        FUSE,
        "sigmoid taken for softmax",
        ROUTING,
        [
            (
                'return Routing(selected.logits, "log_sigmoid", normalize=True)',
                'return Routing(selected.logits, "logits", normalize=True)',
            )
        ],
        blocks(router="sigmoid-normalised"),
    ),
    Mistake(
        FUSE,
        "the smallest scores taken for the largest",
        ROUTERS,
        [('fault = "" if integer_attribute(node, "largest", 1) == 1 else', 'fault = "" if True else')],
        blocks(broken="smallest"),
    ),
    Mistake(
        FUSE,
        "a noticed epsilon dropped",
        WEIGHTS,
        [("noticed = abs(number) * 2.0**25 > smallest", "noticed = abs(number) > smallest")],
        blocks(broken="large-epsilon", experts=4),
    ),
    Mistake(
        FUSE,
        "a weight under another slot's mask",
        "rules/blocks/combines.py",
        [("if own is None or a.slot != b.slot:", "if own is None:")],
        blocks(combine="slots", broken="crossed-slots"),
    ),
    Mistake(
        FORMER,
        "swapped gate and up",
        QUANTIZED,
        [("fc1 = _in_turn(fc1, up)", "fc1 = _in_turn(up, fc1)")],
        quantized_blocks(halves=["apart", "split"]),
    ),
    Mistake(
        FORMER,
        "scales not interleaved with their codes",
        QUANTIZED,
        [("interleaved(gate.scales, up.scales)", "interleaved(up.scales, gate.scales)")],
        quantized_blocks(),
    ),
    Mistake(
        FUSE,
        "zero points lost",
        RULE,
        [("(own.codes, own.scales, own.zero_points)", "(own.codes, own.scales, None)")],
        quantized_blocks(symmetric=False),
    ),
    Mistake(
        FUSE,
        "zero points of gate for both halves",
        QUANTIZED,
        [("interleaved(gate.zero_points, up.zero_points)", "interleaved(gate.zero_points, gate.zero_points)")],
        quantized_blocks(symmetric=False),
    ),
    Mistake(
        FUSE,
        "a factor for each quantized expert lost",
        QUANTIZED,
        [("scaled(fc2.scales, factors)", "fc2.scales")],
        quantized_blocks(router="table"),
    ),
    Mistake(
        FUSE,
        "unnormalised weights left to a kernel that normalises",
        RULE,
        [("elif choice.weighted:", "elif False:")],
        quantized_blocks(router="softmax-topk"),
    ),
    Mistake(
        FUSE,
        "router_weights a softmax over the tokens",
        RULE,
        [("mixing = op.Softmax(logits, axis=-1)", "mixing = op.Softmax(logits, axis=0)")],
        quantized_blocks(router="softmax-topk"),
    ),
    Mistake(
        FUSE,
        "4 bits whatever the codes have",
        RULE,
        [('"expert_weight_bits": fc1.shape.bits,', '"expert_weight_bits": 4,')],
        quantized_blocks(bits=2),
    ),
)

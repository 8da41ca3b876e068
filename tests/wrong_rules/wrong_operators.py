"""Wrong versions of the rules on com.microsoft::MoE and QMoE nodes."""

from __future__ import annotations

from mistakes import Mistake
from shown import FUSED, moes, qmoes, ruled

from rewriter.testing import moe_nodes

ZEROS, FC3, INTERLEAVE = "moe-drop-zero-biases", "moe-fuse-fc3", "swiglu-interleave"
TO_QMOE, TO_MOE, LAYOUT = "moe-to-qmoe", "qmoe-to-moe", "qmoe-layout"
MOE, QMOE, STORED = "rules/blocks/moe.py", "rules/blocks/qmoe.py", "rules/blocks/stored_qmoe.py"
LAYOUTS = "rewriter/operators/layout/stored.py"

APART = {"activation_type": "silu", "k": 2, "normalize_routing_weights": 1}
HALVES = FUSED | {"swiglu_fusion": 2}
UNNORMALISED = FUSED | {"normalize_routing_weights": 0}
asymmetric = {"symmetric": False, "block_size": 16}
plain = {"placements": ["main"], "dtypes": ["float32"], "typed": True}
relu = {"activation_type": "relu", "k": 1}

OPERATORS = (
    Mistake(
        ZEROS,
        "zeros looked for in the first expert only",
        "rules/moe_drop_zero_biases.py",
        [("for expert in range(view.shape[0]))", "for expert in range(1))")],
        moes(bias="first-zero"),
    ),
    Mistake(
        ZEROS,
        "one zero bias taken for all",
        "rules/moe_drop_zero_biases.py",
        [
            (
                "zeros = {slot for slot in biases if _is_zero(self.run.facts, node.inputs[slot])}",
                "zeros = set(biases) if any(_is_zero(self.run.facts, node.inputs[s]) for s in biases) else set()",
            )
        ],
        moes(bias="fc1-zero"),
    ),
    Mistake(
        ZEROS,
        "attributes lost",
        "rewriter/operators/form.py",
        [("if self.activation == SWIGLU.name:", "if self.activation == SWIGLU.name and self.gated:")],
        moes(bias="zero"),
    ),
    Mistake(
        ZEROS,
        "a bias that a caller may give taken for a constant",
        "rewriter/tensors/constant.py",
        [("if value.is_graph_input():", "if False:")],
        moes(bias="zero", given="layer0.fc1_bias"),
    ),
    Mistake(
        FC3,
        "swapped gate and up",
        "rules/moe_fuse_fc3.py",
        [("interleaved(fc1.weight, fc3.weight)", "interleaved(fc3.weight, fc1.weight)")],
        moes(APART, fc3=True),
    ),
    Mistake(
        FC3,
        "a wrong interleave: halves one after another",
        MOE,
        [("StackedCopy((first, second), 2,", "StackedCopy((first, second), 1,")],
        moes(APART, fc3=True),
    ),
    Mistake(
        FC3,
        "bias of gate on both halves",
        "rules/moe_fuse_fc3.py",
        [("return gate or zeros, linear or zeros", "return gate or zeros, gate or zeros")],
        moes(APART, fc3=True),
    ),
    Mistake(
        FC3,
        "interleaved rows called halves",
        "rules/moe_fuse_fc3.py",
        [("activation=SWIGLU.name, fusion=1,", "activation=SWIGLU.name, fusion=2,")],
        moes(APART, fc3=True),
        ruled(FC3, target="cuda@1.28"),
    ),
    Mistake(
        INTERLEAVE,
        "a wrong interleave: rows left as they are",
        "rules/swiglu_interleave.py",
        [("halves.transpose((0, 2, 1, *range(3, halves.rank)))", "halves")],
        moes(HALVES),
    ),
    Mistake(
        INTERLEAVE,
        "a wrong interleave: pairs cut as if they were halves",
        "rules/swiglu_interleave.py",
        [("view.reshape((e, 2, both // 2, *rest))", "view.reshape((e, both // 2, 2, *rest))")],
        moes(HALVES),
    ),
    Mistake(
        INTERLEAVE,
        "bias not interleaved",
        "rules/swiglu_interleave.py",
        [("op.initializer(halves_in_turn(bias)),", "fc1.bias,")],
        moes(HALVES),
    ),
    Mistake(
        TO_QMOE,
        "weights that something else reads too",
        MOE,
        [("if not MOE.computes(use.node) or use.idx not in [slots.weight for slots in MOE.projections]:", "if False:")],
        lambda: moe_nodes(operators=["MoE"], activations=["relu"], obstacles=["weight-also-read"], **plain),
    ),
    Mistake(
        TO_QMOE,
        "absolute scales",
        LAYOUTS,
        [("scales = as_shape(weight.scales,", "scales = as_shape(abs(weight.scales),")],
        moes(),
    ),
    Mistake(
        TO_QMOE,
        "absolute scales, read back as they are",
        LAYOUTS,
        [
            ("scales = as_shape(weight.scales,", "scales = as_shape(abs(weight.scales),"),
            ("            self.unpack_codes(codes),\n", "            self.unpack_codes(codes) * 1,\n"),
        ],
        moes(),
    ),
    Mistake(
        TO_QMOE,
        "off-by-one expert",
        QMOE,
        [("weight = projection.weight.index(0, expert)", "weight = projection.weight.index(0, max(expert - 1, 0))")],
        moes(),
    ),
    Mistake(
        TO_QMOE,
        "the last of many experts is the one before it",
        QMOE,
        [
            (
                "weight = projection.weight.index(0, expert)",
                "weight = projection.weight.index(0, min(expert, projection.weight.shape[0] - 2))",
            )
        ],
        moes(FUSED | {"k": 1}, experts=32),
    ),
    Mistake(
        TO_QMOE,
        "zero points of fc2 in the slot of fc1",
        QMOE,
        [("dict(zip(parts, map", "dict(zip((*parts[:2], 23 - parts[2]), map")],
        moes(),
        ruled(TO_QMOE, **asymmetric),
    ),
    Mistake(
        TO_QMOE,
        "zero points packed along the output features",
        LAYOUTS,
        [
            (
                "pack_codes(rows, self.shape.bits, pad=default_zero_point(self.shape.bits))",
                "pack_codes(rows.T, self.shape.bits).reshape(self.zero_points)",
            ),
            (
                "unpack_codes(packed, shape.bits, self.scales[-1]).reshape(one_a_block)",
                "unpack_codes(packed.reshape(shape.blocks, -1), shape.bits, shape.n).T",
            ),
        ],
        moes(),
        ruled(TO_QMOE, **asymmetric),
    ),
    Mistake(
        TO_QMOE,
        "bias in the slot after its own",
        QMOE,
        [
            (
                "inputs[slots.bias] = projection.bias",
                "inputs[QMOE.projections[projection.name == 'fc1'].bias] = projection.bias",
            )
        ],
        moes(relu),
    ),
    Mistake(
        TO_QMOE,
        "bias lost",
        QMOE,
        [("inputs[slots.bias] = projection.bias", "inputs[slots.bias] = None")],
        moes(),
    ),
    Mistake(
        TO_QMOE,
        "block size of the plan, not the one that was taken",
        QMOE,
        [('found["block_size"] = held.block', 'found["block_size"] = 32')],
        moes(hidden=[32, 48], inter=[32, 48]),
        ruled(TO_QMOE, block_size=64),
    ),
    Mistake(
        TO_QMOE,
        "router_weights a softmax over the tokens",
        QMOE,
        [("op.Softmax(router, axis=-1) if held.choice", "op.Softmax(router, axis=0) if held.choice")],
        moes(UNNORMALISED),
    ),
    Mistake(
        TO_QMOE,
        "stale shared tensor",
        "rewriter/quantize/stack.py",
        [("*(job.key for job in jobs))", "*(job.shape for job in jobs))")],
        moes(nodes=2),
    ),
    Mistake(
        TO_QMOE,
        "unnormalised weights left to a kernel that normalises",
        QMOE,
        [("KernelChoice(kernel, weighted=kernel not in alone)", "KernelChoice(kernel, weighted=False)")],
        moes(UNNORMALISED),
    ),
    Mistake(
        TO_MOE,
        "transposed square weight",
        "rules/qmoe_to_moe.py",
        [
            (
                "projection.expert(index, layout).dequantize().astype",
                "projection.expert(index, layout).dequantize().T.astype",
            )
        ],
        qmoes(attributes=relu),
    ),
    Mistake(
        TO_MOE,
        "zero points left out",
        STORED,
        [("(not z for z in held.zero_points)", "(True for _ in held.zero_points)")],
        qmoes(asymmetric),
    ),
    Mistake(
        TO_MOE,
        "half and linear part of fc1 of another size",
        STORED,
        [("scales[0].shape[1] // form.fused", "scales[0].shape[1]")],
        qmoes(),
    ),
    Mistake(
        TO_MOE,
        "router_weights that mix left out",
        "rules/qmoe_to_moe.py",
        [("    if weights is None:\n        return\n", "    if weights is not None:\n        return\n")],
        qmoes(attributes=UNNORMALISED, mixed=True),
    ),
    Mistake(
        TO_MOE,
        "stale shared tensor",
        STORED,
        [
            (
                "self.key = (what, dtype, shape, projection.shape.bits, *views)",
                "self.key = (what, dtype, shape, projection.shape.bits)",
            )
        ],
        qmoes(nodes=2),
    ),
    Mistake(
        LAYOUT,
        "laid out for another architecture",
        "rules/qmoe_layout.py",
        [
            (
                "lambda index: after.pack_codes",
                "lambda index: layout_named('cutlass-sm90').require(after.shape).pack_codes",
            )
        ],
        qmoes(),
        ruled({LAYOUT: {"layout": "cutlass-sm80"}}, target="cuda:sm80"),
    ),
    Mistake(
        LAYOUT,
        "the new layout not stamped",
        "rules/qmoe_layout.py",
        [
            (
                "write_qmoe(op, self.run, kernel, inputs, attributes, wanted, node)",
                "write_qmoe(op, self.run, kernel, inputs, attributes, stored.layout, node)",
            )
        ],
        qmoes(),
        ruled({LAYOUT: {"layout": "cutlass-sm80"}}, target="cuda:sm80"),
    ),
    Mistake(
        LAYOUT,
        "the matched node stamped before anything is proved",
        "rules/qmoe_layout.py",
        [
            (
                "        inputs = dict(enumerate(node.inputs))",
                '        inputs = dict(enumerate(node.inputs)); node.metadata_props["rewriter.layout"] = wanted.name',
            )
        ],
        qmoes(),
        ruled({LAYOUT: {"layout": "cutlass-sm80"}}, target="cuda:sm80"),
    ),
    Mistake(
        LAYOUT,
        "off-by-one expert",
        STORED,
        [("view.index(0, index).numpy() for view", "view.index(0, max(index - 1, 0)).numpy() for view")],
        qmoes(),
        ruled({LAYOUT: {"layout": "cutlass-sm90"}}, target="cuda:sm90@1.27"),
    ),
    Mistake(
        LAYOUT,
        "fc1 and fc2 in each other's slot",
        "rules/qmoe_layout.py",
        [
            (
                "zip(QMOE.projections, stored.projections, strict=False)",
                "zip(QMOE.projections[1::-1], stored.projections, strict=False)",
            )
        ],
        qmoes(attributes=relu),
        ruled({LAYOUT: {"layout": "cutlass-sm80"}}, target="cuda:sm80"),
    ),
)

"""MoE blocks in plain operators: every spelling that the recognisers know, and one broken thing at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from block_joined import Joined
from block_loops import Loops
from block_parts import (
    ACTIVATIONS,
    COMBINES,
    ELEMENT,
    GIVEN,
    LOOPS,
    ON_CUDA,
    ROUTERS,
    STACKED,
    UNGATED,
    WEIGHTS,
    Graph,
    Spelling,
)
from block_routing import Routing
from block_stacked import Stacked
from onnx import helper, numpy_helper

__all__ = [
    "ACTIVATIONS", "COMBINES", "GIVEN", "LOOPS", "ON_CUDA", "ROUTERS", "STACKED", "WEIGHTS", "Spelling", "block_arrays",
    "block_model",
]  # fmt: skip


class _Writer(Routing, Joined, Stacked, Loops):
    """Writes all parts."""


def block_arrays(how: Spelling) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the weights of a block: gate, up and down [E, N, K], their biases [E, N], router and shared [K, N]."""
    rng = np.random.default_rng(how.random)
    e, h, i = how.experts, how.hidden, how.inter

    def random(name: str, *shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * (0.5 if "bias" in name else 0.3)).astype(how.dtype)

    return {
        "gate": random("gate", e, i, h),
        "up": random("up", e, i, h),
        "down": random("down", e, h, i),
        "gate_bias": random("gate_bias", e, i),
        "up_bias": random("up_bias", e, i),
        "down_bias": random("down_bias", e, h),
        "router": random("router", h, e) * 3,
        "shared": random("shared", h, h),
    }


def block_model(how: Spelling) -> onnx.ModelProto:
    """Returns a model of one block: x [T, H] or [B, S, H] -> y."""
    dtype = np.dtype(how.dtype)
    g = Graph(dtype)
    h = how.hidden
    gated = how.activation not in UNGATED
    arrays = block_arrays(how)
    x = g.op("Identity", "x") if how.alias else "x"
    logits = g.op("MatMul", x, g.weight("router", arrays["router"]))
    writer = _Writer(g, how, arrays, gated)
    weights, chosen = writer.route(logits)
    kind = how.combine.partition("-")[0]
    write = (
        writer.stacked
        if how.combine in STACKED
        else {"joined": writer.joined, "loop": writer.loops}.get(kind, writer.unrolled)
    )
    y = write(x, weights, chosen)
    if how.shared:
        y = g.op("Add", y, g.op("MatMul", x, g.weight("shared", arrays["shared"])))
    g.nodes.append(helper.make_node("Identity", [y], ["y"]))
    lead = ["T"] if how.rank == 2 else ["B", "S"]
    outputs = [helper.make_tensor_value_info("y", ELEMENT[dtype], [*lead, h])]
    if how.broken == "inner-output":
        outputs.append(helper.make_tensor_value_info(writer.inner, ELEMENT[dtype], None))
    if how.broken == "inner-read":
        g.nodes.append(helper.make_node("Relu", [writer.inner], ["seen"]))
        outputs.append(helper.make_tensor_value_info("seen", ELEMENT[dtype], None))
    graph = helper.make_graph(
        g.nodes,
        "block",
        [helper.make_tensor_value_info("x", ELEMENT[dtype], [*lead, h])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in g.initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)

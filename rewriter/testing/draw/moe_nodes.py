"""MoE and QMoE nodes as exporters write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from hypothesis import strategies as st

from rewriter.operators.activation import ACTIVATIONS as KNOWN
from rewriter.operators.activation import SWIGLU
from rewriter.operators.form import OPERATORS as EXPERTS
from rewriter.operators.form import ExpertForm
from rewriter.operators.layout.packing import codes_per_byte
from rewriter.operators.layout.stored import Refusal
from rewriter.operators.qmoe import QMOE, layout_named
from rewriter.quantize.types import QuantizedShape
from rewriter.testing.draw.checked import checked
from rewriter.testing.draw.fused import EXPERT_BIASES, MARKS, MIXINGS, FusedNode, write_node
from rewriter.testing.draw.graph import DTYPES, OPERANDS, Scope, sizes
from rewriter.testing.draw.model import MODERN, draw_model
from rewriter.testing.draw.packed import BITS, LAYOUTS, Packing
from rewriter.testing.draw.placements import PLACEMENTS

OPERATORS = tuple(operator.name for operator in EXPERTS)
_FUSIONS = {1: "", 2: "-concatenated", 0: "-fc3"}
ACTIVATIONS = (
    *(own.name for own in KNOWN if not own.gated),
    *(f"{own.name}{_FUSIONS[fusion]}" for own in KNOWN for fusion in own.fusions),
    *("silu-fc3", "relu-fc3"),
)
"""Activation and how it is gated: not at all, by rows of fc1 in turn or after one another, or by fc3."""
CONSTANTS = ((1.0, 0.0, math.inf), (1.702, 1.0, 7.0), (1.702, 1.0, math.inf))
"""Alpha, beta and limit of SwiGLU."""
NODE_OBSTACLES = (
    "weight-shared",
    "weight-computed",
    "weight-also-read",
    "weight-is-input",
    "weight-is-output",
    "router-rank3",
)
"""What keeps a node from being replaced, or makes it subtle; each model has at most one."""
BLOCK_SIZES = (16, 32, 0)
"""Input features per scale; 0 is the whole row."""


@checked()
@st.composite
def moe_nodes(
    draw: st.DrawFn,
    *,
    max_experts: int = 4,
    max_size: int = 32,
    max_layers: int = 2,
    operators: Sequence[str] = OPERATORS,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    activations: Sequence[str] = ACTIVATIONS,
    biases: Sequence[str] = EXPERT_BIASES,
    bits: Sequence[int] = BITS,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    layouts: Sequence[str] = LAYOUTS,
    obstacles: Sequence[str] = NODE_OBSTACLES,
    typed: bool | None = None,
) -> ir.Model:
    """Draws one or more com.microsoft MoE or QMoE of ``x`` [T, H] or [B, T, H], each with its router before it.

    ONNX Runtime's CPU provider does not run all: not an fc3, concatenated halves, the sparse mixer, relu2, geglu,
    router logits of rank 3, or weights in the CUTLASS layout.

    Args:
        draw: given by Hypothesis.
        max_experts: largest number of experts.
        max_size: largest H and I; QMoE has at least one block of each.
        max_layers: largest number of nodes, one after the other; weights that are shared have two at least.
        operators: MoE, QMoE.
        dtypes: element types of x, scales and float weights, of ``DTYPES``.
        placements: where the nodes stand, of ``PLACEMENTS``.
        activations: of ``ACTIVATIONS``.
        biases: of ``EXPERT_BIASES``.
        bits: of QMoE, widths of a code, of ``BITS``.
        block_sizes: of QMoE, input features per scale, of ``BLOCK_SIZES``.
        layouts: of QMoE's weights, of ``LAYOUTS``; raw where no other is legal.
        obstacles: what may stand in the way, of ``NODE_OBSTACLES``; at most one in a model, and often none.
        typed: whether values carry types and shapes; None draws that too.
    """
    operator = draw(st.sampled_from(operators))
    dtype = draw(st.sampled_from(dtypes))
    experts = draw(st.integers(1, max_experts))
    form = draw(_forms(experts, activations))
    obstacle = draw(st.sampled_from(("", *obstacles)))
    packing, (hidden, intermediate) = None, (draw(sizes(max_size)), draw(sizes(max_size)))
    if operator == QMOE.name:
        packing, hidden, intermediate = draw(_packings(max_size, form, bits, block_sizes, layouts))
    rank3 = obstacle == "router-rank3"
    unlimited = form.activation == SWIGLU.name and math.isinf(form.limit) and draw(st.booleans())
    node = FusedNode(
        form,
        experts,
        hidden,
        intermediate,
        dtype,
        biases=draw(st.sampled_from(biases)),
        packing=packing,
        mixing=draw(st.sampled_from(MIXINGS)),
        mark=draw(st.sampled_from(MARKS)),
        computed=obstacle == "weight-computed",
        attributes={"swiglu_limit": math.inf} if unlimited else {},
        lead=("B", "T") if rank3 else draw(st.sampled_from((("T",), ("B", "T")))),
        flat=not rank3,
    )
    depth = max(draw(st.integers(1, max_layers)), 2 if obstacle == "weight-shared" else 1)
    prefixes = ["" if depth == 1 or obstacle == "weight-shared" else f"layers.{layer}." for layer in range(depth)]
    scope = Scope(draw(st.sampled_from(MODERN)), operands=draw(st.sampled_from(OPERANDS)))

    def body(inner: Scope, x: str) -> str:
        for prefix in prefixes:
            x = write_node(inner, x, node, prefix)
        if obstacle != "weight-also-read":
            return x
        read = f"{prefixes[0]}fc2" if packing is None else f"{prefixes[0]}fc2_scales"
        return inner.op("Add", x, inner.op("ReduceMax", read, keepdims=0))

    return draw_model(
        draw,
        scope,
        body,
        dtype,
        [*node.lead, hidden],
        hidden,
        placements=placements,
        typed=typed,
        weight=f"{prefixes[0]}fc1",
        obstacle=obstacle,
    )


@st.composite
def _forms(draw: st.DrawFn, experts: int, activations: Sequence[str]) -> ExpertForm:
    activation, _, gate = draw(st.sampled_from(activations)).partition("-")
    swiglu = activation == SWIGLU.name
    alpha, beta, limit = draw(st.sampled_from(CONSTANTS)) if swiglu else CONSTANTS[0]
    sparse = experts > 1 and draw(st.integers(0, 7)) == 7
    form = ExpertForm(
        k=2 if sparse else draw(st.integers(1, experts)),
        activation=activation,
        alpha=alpha,
        beta=beta,
        limit=limit,
        normalize=draw(st.booleans()),
        sparse_mixer=sparse,
        gated=gate == "fc3",
    )
    return replace(form, fusion={"concatenated": 2, "fc3": 0}.get(gate, int(form.glu)))


@st.composite
def _packings(
    draw: st.DrawFn,
    max_size: int,
    form: ExpertForm,
    bits: Sequence[int],
    block_sizes: Sequence[int],
    layouts: Sequence[str],
) -> tuple[Packing, int, int]:
    """Draws a packing, and H and I that it can hold."""
    width, block = draw(st.sampled_from(bits)), draw(st.sampled_from(block_sizes))
    layout = draw(st.sampled_from(layouts))
    unit = 32 if layout != "raw" and max_size >= 32 else block or codes_per_byte(width)
    hidden, intermediate = (unit * draw(st.integers(1, max(1, max_size // unit))) for _ in range(2))
    sizes = ((form.fused * intermediate, hidden), (hidden, intermediate))
    stored = [layout_named(layout).of(QuantizedShape(n, k, width, block)) for n, k in sizes]
    if any(isinstance(own, Refusal) for own in stored):
        layout = "raw"
    return Packing(width, block, draw(st.sampled_from(("none", "packed"))), layout), hidden, intermediate

"""What an MoE or QMoE node asks of a kernel, read off its attributes and inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.graph.contents import integer

OPERATORS = ("MoE", "QMoE")
GLU = ("swiglu", "geglu")
"""Activations of one linear that multiply another: both are rows of fc1, or the other is fc3."""
PROJECTIONS = ("fc1", "fc2", "fc3")

SLOTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "MoE": {"weight": (2, 4, 6), "bias": (3, 5, 7)},
    "QMoE": {"weight": (2, 5, 8), "scales": (3, 6, 9), "bias": (4, 7, 10), "zero_points": (11, 12, 13)},
}
"""Input slots of fc1, fc2 and fc3."""

ROUTER_WEIGHTS = 14
"""QMoE's slot for the weights that mix the experts which router_probs selects."""

_SHARED = {
    "k",
    "activation_type",
    "activation_alpha",
    "activation_beta",
    "normalize_routing_weights",
    "use_sparse_mixer",
    "swiglu_fusion",
    "swiglu_limit",
}
_QUANTIZED = {
    "expert_weight_bits",
    "fc1_expert_weight_bits",
    "fc2_expert_weight_bits",
    "fc3_expert_weight_bits",
    "block_size",
    "quant_type",
    "weights_prepacked",
    "accuracy_level",
}


@dataclass(frozen=True)
class ExpertForm:
    """What both operators compute, whatever holds the weights.

    Attributes:
        k: experts per token.
        activation: relu, relu2, gelu (tanh), silu, identity, swiglu, geglu, or what an exporter calls it.
        alpha: of SwiGLU, in ``G * sigmoid(alpha * G) * (L + beta)``.
        beta: of SwiGLU.
        limit: of SwiGLU; infinite where there is none.
        fusion: of ``GLU``: 0 gate and linear apart in fc1 and fc3, 1 rows interleaved in fc1, 2 concatenated.
        normalize: whether the weights of the k experts add up to one.
        sparse_mixer: whether Phi-MoE's router is used.
        gated: whether there is an fc3.
        unknown: attributes that the operator does not have, or whose value a function's caller gives.
    """

    k: int = 1
    activation: str = "relu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    fusion: int = 0
    normalize: bool = False
    sparse_mixer: bool = False
    gated: bool = False
    unknown: tuple[str, ...] = ()

    @property
    def fused(self) -> int:
        """How many halves fc1 holds: 2 for a fused gate, else 1."""
        return 2 if self.activation in GLU and self.fusion else 1

    def attributes(self) -> dict[str, int | float | str]:
        """Returns the attributes of a node of this form; those of SwiGLU only where it is one, and no infinity."""
        found: dict[str, int | float | str] = {
            "k": self.k,
            "activation_type": self.activation,
            "normalize_routing_weights": int(self.normalize),
        }
        if self.sparse_mixer:
            found["use_sparse_mixer"] = 1
        if self.activation in GLU:
            found["swiglu_fusion"] = self.fusion
        if self.activation == "swiglu":
            found |= {"activation_alpha": self.alpha, "activation_beta": self.beta}
            if math.isfinite(self.limit):
                found["swiglu_limit"] = self.limit
        return found


def is_experts(node: ir.Node) -> bool:
    """Whether the node is com.microsoft::MoE or QMoE."""
    return node.domain == "com.microsoft" and node.op_type in OPERATORS


def form_of(node: ir.Node) -> ExpertForm:
    """Reads a node of either operator; absent attributes have the schema's defaults."""
    known = _SHARED | (_QUANTIZED if node.op_type == "QMoE" else set())
    return ExpertForm(
        k=integer(node, "k", 1),
        activation=_text(node, "activation_type", "relu"),
        alpha=_number(node, "activation_alpha", 1.0),
        beta=_number(node, "activation_beta", 0.0),
        limit=_number(node, "swiglu_limit", math.inf),
        fusion=integer(node, "swiglu_fusion", 0),
        normalize=bool(integer(node, "normalize_routing_weights", 0)),
        sparse_mixer=bool(integer(node, "use_sparse_mixer", 0)),
        gated=input_at(node, SLOTS[node.op_type]["weight"][2]) is not None,
        unknown=tuple(sorted(n for n, a in node.attributes.items() if n not in known or a.is_ref())),
    )


def input_at(node: ir.Node, slot: int) -> ir.Value | None:
    """Returns an optional input; None where it is left out, empty, or a constant without elements."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    if value is not None and value.const_value is not None and not value.const_value.size:
        return None
    return value


@dataclass(frozen=True)
class Quantized:
    """How a QMoE holds its weights.

    Attributes:
        bits: width of the codes of fc1, fc2 and fc3.
        block: input features per scale; 0 is the whole row.
        zero_points: whether fc1, fc2 and fc3 have zero points.
        prepacked: the attribute ``weights_prepacked``; -1 where it is absent.
        accuracy_level: the attribute; 0 where it is absent.
        quant_type: the attribute; ``int`` where it is absent.
    """

    bits: tuple[int, int, int]
    block: int
    zero_points: tuple[bool, bool, bool]
    prepacked: int
    accuracy_level: int
    quant_type: str


def quantized_of(node: ir.Node) -> Quantized:
    """Reads how a QMoE node holds its weights."""
    common = integer(node, "expert_weight_bits", 4)
    bits = [integer(node, f"{name}_expert_weight_bits", common) for name in PROJECTIONS]
    zeros = [input_at(node, slot) is not None for slot in SLOTS["QMoE"]["zero_points"]]
    return Quantized(
        bits=(bits[0], bits[1], bits[2]),
        block=max(integer(node, "block_size", 0), 0),
        zero_points=(zeros[0], zeros[1], zeros[2]),
        prepacked=integer(node, "weights_prepacked", -1),
        accuracy_level=integer(node, "accuracy_level", 0),
        quant_type=_text(node, "quant_type", "int"),
    )


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_float()


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_string()

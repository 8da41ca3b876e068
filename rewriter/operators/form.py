"""What an MoE or QMoE node asks of a kernel, read off its attributes and inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from rewriter.graph.contents import integer, number, text
from rewriter.operators.activation import SWIGLU, activation_of
from rewriter.operators.moe import MOE, SHARED_ATTRIBUTES
from rewriter.operators.operator import ExpertsOperator, input_at
from rewriter.operators.qmoe import QMOE, ROUTER_WEIGHTS

OPERATORS: tuple[ExpertsOperator, ...] = (MOE, QMOE)
"""The operators that run experts."""
ExpertsName = Literal["MoE", "QMoE"]
FLOAT_EXPERTS: ExpertsName = "MoE"
PROJECTIONS = tuple(slots.name for slots in MOE.projections)


@dataclass(frozen=True)
class ExpertForm:
    """What both operators compute, whatever holds the weights.

    Attributes:
        k: experts per token.
        activation: the name of one of ``ACTIVATIONS``, or what an exporter calls it.
        alpha: of SwiGLU; see ``Activation.swiglu``.
        beta: of SwiGLU.
        limit: of SwiGLU; infinite where there is none.
        fusion: of a gated activation; see ``Activation.fusions``.
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

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> ExpertForm:
        """Reads attributes; absent ones have the schema's defaults."""
        found = {**SHARED_ATTRIBUTES, **attributes}
        return cls(
            k=found["k"],
            activation=found["activation_type"],
            alpha=found["activation_alpha"],
            beta=found["activation_beta"],
            limit=found["swiglu_limit"],
            fusion=found["swiglu_fusion"],
            normalize=bool(found["normalize_routing_weights"]),
            sparse_mixer=bool(found["use_sparse_mixer"]),
        )

    @property
    def glu(self) -> bool:
        """Whether the activation multiplies another linear: both are rows of fc1, or the other is fc3."""
        known = activation_of(self.activation)
        return known is not None and known.gated

    @property
    def fused(self) -> int:
        """How many halves fc1 holds: 2 for a fused gate, else 1."""
        return 2 if self.glu and self.fusion else 1

    def attributes(self) -> dict[str, int | float | str]:
        """Returns the attributes of a node of this form; those of SwiGLU only where it is one, and no infinity."""
        found: dict[str, int | float | str] = {
            "k": self.k,
            "activation_type": self.activation,
            "normalize_routing_weights": int(self.normalize),
        }
        if self.sparse_mixer:
            found["use_sparse_mixer"] = 1
        if self.glu:
            found["swiglu_fusion"] = self.fusion
        if self.activation == SWIGLU.name:
            found |= {"activation_alpha": self.alpha, "activation_beta": self.beta}
            if math.isfinite(self.limit):
                found["swiglu_limit"] = self.limit
        return found


def operator_of(node: ir.Node) -> ExpertsOperator | None:
    return next((operator for operator in OPERATORS if operator.computes(node)), None)


def is_experts(node: ir.Node) -> bool:
    return operator_of(node) is not None


def form_of(node: ir.Node) -> ExpertForm:
    """Reads a node of either operator; absent attributes have the schema's defaults."""
    operator = operator_of(node) or MOE
    return ExpertForm(
        k=integer(node, "k", 1),
        activation=text(node, "activation_type", "relu"),
        alpha=number(node, "activation_alpha", 1.0),
        beta=number(node, "activation_beta", 0.0),
        limit=number(node, "swiglu_limit", math.inf),
        fusion=integer(node, "swiglu_fusion", 0),
        normalize=bool(integer(node, "normalize_routing_weights", 0)),
        sparse_mixer=bool(integer(node, "use_sparse_mixer", 0)),
        gated=input_at(node, operator.projections[2].weight) is not None,
        unknown=tuple(sorted(n for n, a in node.attributes.items() if n not in operator.attributes or a.is_ref())),
    )


@dataclass(frozen=True)
class Routed:
    """What a mixture of experts reads of its tokens, as a proof has to feed it.

    Attributes:
        x: [T, H] or [B, S, H].
        logits: [T, E]; selects the experts.
        mixing: [T, E], or None.
        k: experts per token.
        experts: E, or None where no shape tells.
        hidden: H, or None where no shape tells.
        dtype: of x and the logits, as far as the weights tell it.
    """

    x: ir.Value | None
    logits: ir.Value | None
    mixing: ir.Value | None
    k: int
    experts: int | None
    hidden: int | None
    dtype: ir.DataType | None


def routed(node: ir.Node) -> Routed | None:
    """Returns what a node of either operator reads of its tokens; None for any other node."""
    operator = operator_of(node)
    if operator is None:
        return None
    fc1, fc2, _ = operator.projections
    values = [node.inputs[slot] if slot < len(node.inputs) else None for slot in (0, 1, fc1.weight, fc2.weight)]
    if operator.quantized:
        values.append(node.inputs[ROUTER_WEIGHTS] if len(node.inputs) > ROUTER_WEIGHTS else None)
    down = node.inputs[fc2.scales] if fc2.scales is not None and fc2.scales < len(node.inputs) else values[3]
    return Routed(
        x=values[0],
        logits=values[1],
        mixing=values[4] if operator.quantized else None,
        k=form_of(node).k,
        experts=_extent(values[2], 0),
        hidden=_extent(down, 1),
        dtype=None if operator.quantized or values[3] is None else values[3].dtype,
    )


def _extent(value: ir.Value | None, axis: int) -> int | None:
    dim = None if value is None or value.shape is None else value.shape[axis]
    return dim if isinstance(dim, int) else None

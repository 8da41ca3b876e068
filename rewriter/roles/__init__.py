"""What each weight of a model is for, found from the graph's structure and not from names.

`find_roles` reads the graph once, forwards, and keeps one fact per value: on the residual stream, made by that linear,
inside of a gated MLP, attention score, looked up in a table, routing, part of a constant. Where facts meet, the nodes
behind them are told what they are: a product of an activated and a plain linear that another linear reads is an MLP;
an activation scaled, selected or permuted by what derives from a TopK is a routed expert's; the operands of
MatMul-Softmax-MatMul are an attention's projections.

Roles: ``router``, ``expert`` (a fused MoE or QMoE node), ``expert.gate_up|gate|up|down``,
``shared_expert.gate_up|gate|up|down|router``, ``mlp.gate_up|gate|up|down``, ``attention.q|k|v|qkv|o`` (and ``kv``,
``qk`` for other packings), ``lm_head``, ``embedding``. An ungated MLP's first linear is ``up``. A node that picks an
expert's weight at run time (Gather, GatherND, GatherBlockQuantized) has the role of the linear that reads it, and
com.microsoft::Attention, which holds its projection itself, is ``attention.qkv``.

A router is every linear that serves nothing but a choice of experts, hidden ones too, and the gate of a mixture whose
experts all run. A hidden linear that anything else reads is not; a hyper-connection's gate, on which a choice depends
only through the residual stream, is not either.

Layer: the index of the attention-and-feed-forward pair along the data flow, from 0.

| node | layer |
| --- | --- |
| attention | a new one |
| cross-attention | that of the self-attention before it |
| MLP or MoE | that of the attention before it; a new one where there is none, or where it has its MLP already |
| parallel attention and MLP | they share one |
| other mixers (convolution, state space) | none: the MLP or MoE after them opens it |
| ``lm_head``, ``embedding``, nodes in function bodies | none |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.errors import RuleError
from rewriter.facts import Facts
from rewriter.facts.constants import constants
from rewriter.roles.flow import Flow
from rewriter.roles.naming import name_sources

__all__ = ["ROLES", "Role", "find_roles"]

_PARTS = ("gate_up", "gate", "up", "down")
_PROJECTIONS = ("q", "k", "v", "o", "qkv", "qk", "kv", "qv")

ROLES = (
    *("router", "expert", "lm_head", "embedding", "shared_expert.router"),
    *(f"{family}.{part}" for family in ("expert", "shared_expert", "mlp") for part in _PARTS),
    *(f"attention.{letters}" for letters in _PROJECTIONS),
)
"""Every role that is found."""


@dataclass(frozen=True)
class Role:
    """What a weight is for.

    Attributes:
        name: one of the names above; empty where the structure does not tell.
        layer: index of the layer, or None.
        expert: index of the expert, where it is static, or None.
    """

    name: str = ""
    layer: int | None = None
    expert: int | None = None


def find_roles(model: ir.Model, facts: Facts | None = None) -> Mapping[ir.Node, Role]:
    """Finds the role of every node that reads a weight; nodes of which the structure tells nothing are absent.

    Covers the main graph, the bodies of If, Loop and Scan, and function bodies, each function on its own. Reads no
    tensor larger than a few integers and changes nothing.

    Args:
        model: the model; need not be valid.
        facts: what is known of its constants; found out by default.

    Returns:
        The roles by node, in no particular order.
    """
    if facts is None:
        facts = Facts(model, constants)
        with contextlib.suppress(RuleError):  # of constants that cannot be read no more is known
            facts.compute()
    roles = dict(_roles(model.graph, facts, layered=True))
    for function in model.functions.values():
        roles.update(_roles(function, facts, layered=False))
    return roles


def _roles(graph: ir.Graph | ir.Function, facts: Facts, *, layered: bool) -> Iterator[tuple[ir.Node, Role]]:
    flow = Flow(graph, facts)
    for source, name in name_sources(flow.ledger.sources, flow.lookups):
        if not name or source.node is None:
            continue
        placed = layered and name not in ("lm_head", "embedding")
        role = Role(name, source.layer if placed else None, source.expert if source.routed else None)
        yield source.node, role
        for gather in source.gathers:
            yield gather, Role(name, role.layer)

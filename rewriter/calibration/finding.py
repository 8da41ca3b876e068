"""Finding where a graph applies its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from rewriter.calibration.identity import stored_parts
from rewriter.calibration.sites import ExpertSite, GatheredSite, LinearSite, LookupSite, Sites
from rewriter.engine.context import ModelRun
from rewriter.graph.contents import integer
from rewriter.graph.walk import producers, walk
from rewriter.operators.form import form_of, is_experts
from rewriter.operators.moe import MOE
from rewriter.operators.operator import input_at
from rewriter.tensors import View

_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""What may stand between a matrix that is taken from a stack and its product."""


def find_sites(run: ModelRun, nodes: Iterable[ir.Node] | None = None) -> Sites:
    """Finds where the main graph of a model applies its weights.

    Args:
        run: its facts tell what is a weight.
        nodes: where to look; by default at all nodes.
    """
    linears: dict[tuple[ir.Value, bool], LinearSite] = {}
    experts: list[ExpertSite] = []
    gathered: list[GatheredSite] = []
    lookups: list[LookupSite] = []
    for node in run.model.graph if nodes is None else nodes:
        if is_experts(node):
            site = _experts(run, node)
            if site is not None:
                experts.append(site)
        elif node.domain == "" and node.op_type in ("MatMul", "Gemm"):
            for x, turned, weight in _linears(run, node):
                found = linears.setdefault((x, turned), LinearSite(x, turned))
                found.parts += [part for part in stored_parts(weight) if part not in found.parts]
            gathered += _gathered(run, node)
        elif node.domain == "" and node.op_type == "Gather" and run.role(node).name == "embedding":
            table = run.facts.get(node.inputs[0], View)
            if table is not None and table.rank == 2 and integer(node, "axis", 0) == 0 and node.inputs[1] is not None:
                lookups.append(LookupSite(node.inputs[1], table.name, table.shape[0]))
    return Sites(
        tuple(site for site in linears.values() if site.parts), tuple(experts), tuple(gathered), tuple(lookups)
    )


def _linears(run: ModelRun, node: ir.Node) -> Iterator[tuple[ir.Value, bool, View]]:
    """Yields x, whether it is turned, and the weight [N, K], for the operand of a product that is a weight."""
    left, right = node.inputs[0], node.inputs[1]
    gemm = node.op_type == "Gemm"
    a, b = run.facts.get(left, View), run.facts.get(right, View)
    turned = gemm and bool(integer(node, "transA", 0))
    if left is not None and a is None and b is not None and b.rank == 2:
        yield left, turned, b if gemm and integer(node, "transB", 0) else b.T
    if right is not None and b is None and a is not None and a.rank == 2:
        yield right, not (gemm and integer(node, "transB", 0)), a.T if turned else a


def _experts(run: ModelRun, node: ir.Node) -> ExpertSite | None:
    """Reads an MoE whose weights are constants."""
    if not MOE.computes(node):
        return None
    weights = [run.facts.get(input_at(node, slots.weight), View) for slots in MOE.projections]
    biases = [run.facts.get(input_at(node, slots.bias), View) for slots in MOE.projections]
    x, logits = input_at(node, 0), input_at(node, 1)
    form = form_of(node)
    fc1, fc2, fc3 = weights
    if x is None or logits is None or fc1 is None or fc2 is None or form.unknown or (form.gated and fc3 is None):
        return None
    return ExpertSite(
        x, logits, form, fc1, biases[0], fc2, biases[1], fc3, biases[2], run.role(node).layer, node.outputs[0]
    )


def _gathered(run: ModelRun, node: ir.Node) -> Iterator[GatheredSite]:
    """Yields the operand of a product with what a run-time index takes from a stack, whichever side it is on."""
    if len(node.inputs) < 2 or node.op_type != "MatMul":
        return
    for x, weight, turned in ((node.inputs[0], node.inputs[1], False), (node.inputs[1], node.inputs[0], True)):
        taken = _taken(weight)
        stack = None if taken is None else run.facts.get(taken.inputs[0], View)
        ids = None if taken is None else taken.inputs[1]
        if x is None or stack is None or stack.rank != 3 or not stack.is_whole or ids is None:
            continue
        if run.facts.get(ids, View) is None:
            nd = taken is not None and taken.op_type == "GatherND"
            yield GatheredSite(x, turned, ids, nd, stack.name, stack.shape[0], run.role(node).layer)


def _taken(value: ir.Value | None) -> ir.Node | None:
    """The Gather or GatherND along the first axis that takes what ``value`` is, moved about, from something."""

    def unmoved(at: ir.Value) -> list[ir.Value]:
        producer = at.producer()
        return producers(at)[:1] if producer is not None and not producer.domain and producer.op_type in _MOVES else []

    for at in walk(() if value is None else [value], unmoved, limit=None):
        producer = at.producer()
        if producer is None or producer.domain:
            return None
        if producer.op_type == "Gather" and integer(producer, "axis", 0) == 0:
            return producer
        if producer.op_type == "GatherND" and integer(producer, "batch_dims", 0) == 0:
            return producer
    return None

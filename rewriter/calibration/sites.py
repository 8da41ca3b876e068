"""Where a graph applies its weights: the values to look at, and the stored matrices that see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from rewriter.calibration.identity import Part, stored_parts
from rewriter.engine.context import ModelRun
from rewriter.graph.contents import integer
from rewriter.operators.form import ExpertForm, form_of, is_experts
from rewriter.operators.moe import MOE
from rewriter.operators.operator import input_at
from rewriter.tensors import View


@dataclass
class LinearSite:
    """A value that linear maps read.

    Attributes:
        x: [.., K], or with ``turned`` [.., K, T].
        turned: whether the features are its last axis but one: a weight on the left, or a Gemm that transposes.
        parts: the stored matrices that are applied to it.
    """

    x: ir.Value
    turned: bool
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertSite:
    """A block of experts behind one router.

    Attributes:
        x: [T, H] or [B, S, H].
        logits: [T, E] or [B, S, E].
        form: how it chooses and what is between the projections.
        fc1: [E, F * I, H].
        fc1_bias: [E, F * I], or None.
        fc2: [E, H, I].
        fc3: [E, I, H], or None.
        fc3_bias: [E, I], or None.
        layer: index of the layer, or None.
    """

    x: ir.Value
    logits: ir.Value
    form: ExpertForm
    fc1: View
    fc1_bias: View | None
    fc2: View
    fc3: View | None
    fc3_bias: View | None
    layer: int | None

    @property
    def experts(self) -> int:
        """E."""
        return self.fc1.shape[0]

    def parts(self, *weights: View | None) -> list[set[Part]]:
        """Returns the stored matrices of one projection, or of several that see the same, by expert.

        A matrix of two axes that only one expert shows is that expert's own, of which it shows perhaps not all.
        """
        found: list[set[Part]] = [set() for _ in range(self.experts)]
        for weight in weights:
            for expert in range(self.experts if weight is not None else 0):
                assert weight is not None
                found[expert].update(stored_parts(weight.index(0, expert), expert))
        shared = Counter(name for parts in found for name in {part.source for part in parts})
        alone = {name for name, count in shared.items() if count == 1}
        return [{Part(p.source, None if p.source in alone else p.expert) for p in parts} for parts in found]


@dataclass(frozen=True)
class LookupSite:
    """A table of which rows are looked up.

    Attributes:
        ids: the indices.
        source: name of the table.
        rows: V.
    """

    ids: ir.Value
    source: str
    rows: int


@dataclass(frozen=True)
class Sites:
    """Everything that is to be looked at in a graph."""

    linears: tuple[LinearSite, ...]
    experts: tuple[ExpertSite, ...]
    lookups: tuple[LookupSite, ...]

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The values to look at."""
        values = [site.x for site in self.linears]
        values += [site.x for site in self.experts]
        values += [site.logits for site in self.experts]
        values += [site.ids for site in self.lookups]
        return tuple(dict.fromkeys(values))


def find_sites(run: ModelRun) -> Sites:
    """Finds where the main graph of a model applies its weights; the facts of ``run`` tell what is a weight."""
    linears: dict[tuple[ir.Value, bool], LinearSite] = {}
    experts, lookups = [], []
    for node in run.model.graph:
        if is_experts(node):
            site = _experts(run, node)
            if site is not None:
                experts.append(site)
        elif node.domain == "" and node.op_type in ("MatMul", "Gemm"):
            for x, turned, weight in _linears(run, node):
                found = linears.setdefault((x, turned), LinearSite(x, turned))
                found.parts += [part for part in stored_parts(weight) if part not in found.parts]
        elif node.domain == "" and node.op_type == "Gather" and run.role(node).name == "embedding":
            table = run.facts.get(node.inputs[0], View)
            if table is not None and table.rank == 2 and integer(node, "axis", 0) == 0 and node.inputs[1] is not None:
                lookups.append(LookupSite(node.inputs[1], table.name, table.shape[0]))
    return Sites(tuple(site for site in linears.values() if site.parts), tuple(experts), tuple(lookups))


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
    return ExpertSite(x, logits, form, fc1, biases[0], fc2, fc3, biases[2], run.role(node).layer)

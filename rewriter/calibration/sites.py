"""Where a graph applies its weights: the values to look at, and the stored matrices that see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from rewriter.calibration.identity import Part, stored_parts
from rewriter.operators.form import ExpertForm
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
        fc2_bias: [E, H], or None.
        fc3: [E, I, H], or None.
        fc3_bias: [E, I], or None.
        layer: index of the layer, or None.
        y: what the block computes, as x; None where the model that is run holds no such value.
    """

    x: ir.Value
    logits: ir.Value
    form: ExpertForm
    fc1: View
    fc1_bias: View | None
    fc2: View
    fc2_bias: View | None
    fc3: View | None
    fc3_bias: View | None
    layer: int | None
    y: ir.Value | None = None

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in (self.fc1, self.fc2, self.fc3) if view is not None)

    @property
    def experts(self) -> int:
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
class GatheredSite:
    """A value that is multiplied with matrices of a stack, which the input chooses.

    Attributes:
        x: [.., K], or with ``turned`` [.., K, N].
        turned: whether the features are its last axis but one.
        ids: the experts that are taken from the stack.
        nd: whether they are indices of a GatherND, each a row of numbers: of one, where it takes whole matrices.
        source: name of the stack.
        experts: E.
        layer: index of the layer, or None.
    """

    x: ir.Value
    turned: bool
    ids: ir.Value
    nd: bool
    source: str
    experts: int
    layer: int | None


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
    gathered: tuple[GatheredSite, ...]
    lookups: tuple[LookupSite, ...]

    @property
    def values(self) -> tuple[ir.Value, ...]:
        values = [site.x for site in self.linears]
        values += [site.x for site in self.experts]
        values += [site.logits for site in self.experts]
        values += [value for site in self.gathered for value in (site.x, site.ids)]
        values += [site.ids for site in self.lookups]
        return tuple(dict.fromkeys(values))

    def without(self, parts: Collection[Part]) -> Sites:
        """Returns the sites without some stored matrices."""
        sources = {part.source for part in parts}
        kept = [replace(site, parts=[part for part in site.parts if part not in parts]) for site in self.linears]
        gathered = tuple(site for site in self.gathered if site.source not in sources)
        return replace(self, linears=tuple(site for site in kept if site.parts), gathered=gathered)

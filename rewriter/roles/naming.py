"""From what the ledger gathered to names: sweeps up and down the ledger, each linear in its length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from rewriter.roles.facts import Source, feed_forward_layer
from rewriter.roles.routers import find_hidden_layers


def name_sources(sources: Sequence[Source], lookups: Mapping[Source, ir.Value]) -> Iterator[tuple[Source, str]]:
    """Every source that is a node, with its role's name (empty where the structure does not tell)."""
    _find_stacks(sources)
    _sweep_up(sources)
    _sweep_down(sources)
    find_hidden_layers(sources)
    _find_families(sources)
    embeddings = _embeddings(lookups)
    heads = _heads(sources, lookups, {source.size for source in embeddings} - {None})
    inherited: dict[Source, tuple[str, int | None]] = {}
    for source in reversed(sources):
        if source.node is None:
            continue
        if source in lookups:
            yield source, "embedding" if source in embeddings else ""
            continue
        name = _name(source)
        if source in heads and (not name or (name == "router" and not (source.confirmed or source.mixes))):
            yield source, "lm_head"
            continue
        if not name and source in inherited and "sum" not in source.uses:
            name, source.layer = inherited[source]
        if source.via is not None and "." in name:
            for leaf in source.via.parts or (source.via,):
                inherited.setdefault(leaf, (name, source.layer))
        yield source, name


def _find_stacks(sources: Sequence[Source]) -> None:
    """Slices of one stack that read one place are experts.

    Not where they read different places (the stack is of layers), project into an attention or end in one another's
    MLP (it is of projections).
    """
    groups: dict[tuple[ir.Value, int], list[Source]] = defaultdict(list)
    projections: set[ir.Value] = set()
    for source in sources:
        if source.stack is not None and not source.uses & set("qkvo"):
            groups[source.stack, source.point].append(source)
        gate, up = source.gate, source.up
        if gate and up and up.stack is not None and gate.stack is up.stack and gate.expert != up.expert:
            projections.add(up.stack)
    for (stack, _), group in groups.items():
        if stack not in projections and len({source.expert for source in group}) >= 2:
            for source in group:
                source.routed = True
                source.layer = feed_forward_layer(source.depth) if source.layer is None else source.layer


def _sweep_up(sources: Sequence[Source]) -> None:
    """What is routed inside makes a down projection routed; in a union it says nothing of the other parts."""
    holding: set[Source] = set()
    for source in sources:
        inner = [part for part in (source.gate, source.up) if part is not None]
        source.routed |= any(part.routed or part in holding for part in inner)
        if any(part.routed or part in holding for part in source.parts):
            holding.add(source)
        if source.expert is None and inner:
            experts = {part.expert for part in inner} - {None}
            source.expert = experts.pop() if len(experts) == 1 else None


def _sweep_down(sources: Sequence[Source]) -> None:
    """What is known of a union holds for its parts; what is known of a down projection, for its gate and up."""
    for source in reversed(sources):
        for part in source.parts:
            part.uses |= source.uses
            part.router |= source.router
            part.confirmed |= source.confirmed
            part.mixes |= source.mixes
            part.readers += source.readers
            part.gates = part.gates or source.gates
            part.size = part.size or source.size
            _tell(part, source, source.expert)
        for inner, use in ((source.gate, "gate"), (source.up, "up")):
            if inner is not None:
                inner.uses.add(use)
                _tell(inner, source, source.expert if inner.readers == 1 else None)


def _tell(part: Source, whole: Source, expert: int | None) -> None:
    part.routed |= whole.routed
    part.layer = whole.layer if part.layer is None else part.layer
    part.expert = expert if part.expert is None else part.expert


def _find_families(sources: Sequence[Source]) -> None:
    """A dense MLP that reads the place that a routed block reads is a shared expert."""
    blocks = (source for source in sources if source.up is not None or "experts" in source.uses)
    routed = {source.point for source in blocks if source.routed}
    for source in reversed(sources):
        if source.up is not None:
            source.family = "expert" if source.routed else "shared_expert" if source.point in routed else "mlp"
        for part in (source.gate, source.up, *source.parts):
            if part is not None:
                part.family = part.family or source.family


def _name(source: Source) -> str:
    uses = source.uses
    if "experts" in uses:
        return "expert"
    if source.router or source.confirmed or source.mixes:
        return "router"
    projections = "".join(letter for letter in "qkv" if letter in uses)
    if projections:
        return f"attention.{projections}"
    if "o" in uses:
        return "attention.o"
    if source.up is not None:
        return f"{source.family}.down"
    if source.family and uses & {"gate", "up"}:
        return f"{source.family}.{'_'.join(use for use in ('gate', 'up') if use in uses)}"
    if source.gates is not None:
        source.layer = source.gates.layer
        return "shared_expert.router" if source.gates.family == "shared_expert" else ""
    if source.routed:  # the activation is not one that we know
        return "expert.down" if "mixed" in uses else "expert.gate_up"
    return ""


def _heads(sources: Sequence[Source], lookups: Mapping[Source, ir.Value], vocabularies: set[int | None]) -> set[Source]:
    """Linears that end in a graph output as wide as a vocabulary; else the widest, where it widens what it reads."""
    ending = [source for source in sources if source.node and "out" in source.uses and source not in lookups]
    matching = {source for source in ending if source.size in vocabularies}
    if matching:
        return matching
    widest = max((source.size or 0 for source in ending), default=0)
    return {source for source in ending if (source.size or 0) == widest and widest**2 > (source.elements or 0)}


def _embeddings(lookups: Mapping[Source, ir.Value]) -> set[Source]:
    """Tables that reach the residual stream, and those looked up by the same ids."""
    ids = {lookups[source] for source in lookups if source.uses & {"sum", "out"}}
    return {source for source in lookups if lookups[source] in ids}

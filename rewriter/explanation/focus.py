"""What of a run concerns one node or one weight."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import onnx_ir as ir

from rewriter.engine.weights import planned
from rewriter.errors import UsageError
from rewriter.explanation.coverage import EXPERTS, unread_here
from rewriter.explanation.observer import Nearest
from rewriter.graph.contents import all_nodes, name_of
from rewriter.graph.walk import readers, walk
from rewriter.inspection.weights import MOVES
from rewriter.report import Application, Decline, Weight
from rewriter.result import Result
from rewriter.roles import find_roles
from rewriter.roles.operators import ATTENTION, FUSED_EXPERTS, LINEAR
from rewriter.text import plural

_FAR = 256
"""Nodes behind a node that may be of its block."""

_APART = ATTENTION | FUSED_EXPERTS

_SLICE = "__slice_"


@dataclass(frozen=True)
class Concern:
    """A node or weight, and what a run did about it.

    Attributes:
        name: its name.
        what: kind, type, role and what becomes of it, in one line.
        applications: rewrites at it, or at what reads it.
        absorbed: rewrites elsewhere that took it along.
        declines: of rules whose pattern was there.
        unknown: values behind it that a recogniser almost knew; with an empty rule.
        further: declines of rules that begin behind it, and whose block it may be part of.
        others: rules that were tried there and are about something else.
        note: what no rule of the rule set reads; empty where that is not it.
    """

    name: str
    what: str
    applications: tuple[Application, ...]
    absorbed: tuple[Application, ...]
    declines: tuple[Decline, ...]
    unknown: tuple[Decline, ...]
    further: tuple[Decline, ...]
    others: tuple[str, ...]
    note: str

    @property
    def untouched(self) -> bool:
        """Whether nothing was done to it and nothing was tried."""
        found = self.applications or self.absorbed or self.declines or self.unknown or self.further or self.others
        return not (found or self.note)


class Focus:
    """A name in a model, what it means there, and what looks on while the model is rewritten."""

    def __init__(self, name: str, model: ir.Model) -> None:
        self.name = name
        self._model = model
        self._nodes = {n.name: n for n in all_nodes(model) if n.name}
        self._makers = {v.name: n for n in all_nodes(model) for v in n.outputs if v.name}
        self._tensors = {key: value for graph in model.graphs() for key, value in graph.initializers.items()}
        self._roles = find_roles(model)
        self._first = self._find(name)
        self._here = set(map(name_of, _behind(self._first)))
        further = self._further(self._first)
        self._beyond = [name for name in map(name_of, further) if name not in self._here]
        behind = {v.name for node in (*_behind(self._first), *further) for v in node.outputs if v.name}
        self.watch = Nearest(self._here, behind)

    def _find(self, name: str) -> list[ir.Node]:
        """The nodes that the name stands for: itself, what computes it, or what reads it."""
        node = self._nodes.get(name) or self._makers.get(name)
        tensor = self._tensors.get(name) or self._tensors.get(name.partition(_SLICE)[0])
        if node is not None:
            return [node]
        if tensor is not None:
            return [use.node for use in tensor.uses()]
        if readers := [node for node, role in self._roles.items() if fnmatchcase(role.name, name)]:
            return readers
        tensors = (value for key, value in self._tensors.items() if fnmatchcase(key, name))
        nodes = (node for key, node in self._nodes.items() if fnmatchcase(key, name))
        return list(dict.fromkeys([*nodes, *(use.node for value in tensors for use in value.uses())]))

    def _further(self, first: Sequence[ir.Node]) -> list[ir.Node]:
        """What follows, nearest first, up to another block."""

        def near(node: ir.Node) -> list[ir.Node]:
            return [reader for reader in _following(node) if not self._is_apart(reader)]

        return list(itertools.islice(walk(first, near, limit=None), _FAR))

    def _is_apart(self, node: ir.Node) -> bool:
        """Whether a node is of another block than what comes before it."""
        role = self._roles.get(node)
        expert = role is not None and role.name.startswith("expert")
        return node.op_type in _APART or (node.op_type in LINEAR and not expert)

    def concern(self, result: Result[Any]) -> Concern:
        """Finds what concerns it, once the model is rewritten.

        Raises:
            UsageError: nothing has this name; the message holds the nearest name.
        """
        name, report = self.name, result.report
        first, what = self._describe(result)
        here = set(map(name_of, _behind(first)))
        here |= {weight.node for weight in planned(result.ir_model) if self._means(weight)}
        applications = tuple(a for a in report.applications if a.node in here)
        names = {node.name for node in first if node.name}
        absorbed = tuple(a for a in report.applications if a.node not in here and names & set(a.removed))
        declines = [d for d in self.watch.attempts if d.node in here]
        known = {(d.rule, d.node, d.reason) for d in declines}
        declines += [d for d in report.declines if d.culprit == name and (d.rule, d.node, d.reason) not in known]
        beyond = {node: place for place, node in enumerate(self._beyond)}
        further = sorted((d for d in report.declines if d.node in beyond), key=lambda d: beyond[d.node])
        done = bool(applications or absorbed)
        unknown = [u for u in self.watch.unknown if not any(u.reason in d.reason for d in declines)]
        unknown = [u for u in unknown if not self._is_embedding(self._nodes.get(u.culprit))]
        note = unread_here(
            result.rule_set,
            experts=any(node.op_type == EXPERTS[1] for node in first),
            embedding=any(map(self._is_embedding, first)),
        )
        order = {phase: place for place, phase in enumerate(report.sweeps)}
        fired = {application.node: order[application.phase] for application in applications}
        last = set(report.declines)
        stayed = [d for d in declines if d.node not in fired or (d in last and order[d.phase] >= fired[d.node])]
        stopped = {decline.rule for decline in declines}
        others = {rule for rule, node in self.watch.others if node in here and node not in fired} - stopped
        return Concern(
            name,
            what,
            applications,
            absorbed,
            declines=tuple(stayed),
            unknown=() if done else tuple(unknown),
            further=() if done or declines else tuple(further),
            others=() if done else tuple(sorted(others)),
            note="" if done else note,
        )

    def _describe(self, result: Result[Any]) -> tuple[list[ir.Node], str]:
        name = self.name
        weights = {weight.name: weight for weight in planned(result.ir_model)}
        node = self._nodes.get(name) or self._makers.get(name)
        if node is not None:
            return [node], ", ".join(filter(None, (f"node, {node.op_type}", self._role(node))))
        if name in self._tensors:
            tensor = self._tensors[name].const_value
            kind = "weight" if tensor is None else f"weight, {tensor.dtype.name}{list(tensor.shape.numpy())}"
            fate = _spec(weights[name]) if name in weights else _fate(name, result.ir_model)
            made = [weight for weight in weights.values() if self._means(weight)]
            if name not in weights and made:
                ((one, _),) = Counter(map(_spec, made)).most_common(1)
                fate = f"{fate}: {plural(len(made), 'weight')} {one}"
            return self._first, f"{kind}, {fate}"
        if name in weights:
            weight = weights[name]
            readers = [self._nodes[weight.node]] if weight.node in self._nodes else self._first
            return readers, f"slice, {list(weight.shape)}, {_spec(weight)}"
        if self._first:
            return self._first, self._describe_several(weights.values())
        close = difflib.get_close_matches(name, [*names_of(self._model), *weights], n=1, cutoff=0.5)
        hint = f" (did you mean '{close[0]}'?)" if close else "; without a name, explain is about the whole model"
        raise UsageError(f"the model has no node, weight or role '{name}'{hint}")

    def _means(self, weight: Weight) -> bool:
        """Whether the name stands for a weight that will be quantized."""
        known = (weight.name, weight.node, weight.role, *weight.sources)
        return self.name in known or any(fnmatchcase(name, self.name) for name in known)

    def _describe_several(self, weights: Iterable[Weight]) -> str:
        """Of a role or a glob: how many nodes, and what would become of the weights."""
        name = self.name
        mine = [weight for weight in weights if self._means(weight)]
        counts = Counter(map(_spec, mine)).most_common()
        fates = "; ".join(f"{plural(count, 'weight')} {spec}" for spec, count in counts)
        kind = "role" if any(fnmatchcase(role.name, name) for role in self._roles.values()) else "pattern"
        return f"{kind}, {plural(len(self._first), 'node')}; {fates or 'all weights stay float'}"

    def about(self, name: str) -> str:
        """Describes a node or value of the model as given; empty where it has none of this name."""
        if name in self._nodes:
            return f"{self._nodes[name].op_type} node"
        value = self._tensors.get(name)
        maker = self._makers.get(name)
        if value is None and maker is not None:
            value = next(v for v in maker.outputs if v.name == name)
        value = value or next((v for v in self._model.graph.inputs if v.name == name), None)
        if value is None:
            return ""
        made = "input of the model" if maker is None else f"made by {maker.op_type}"
        kind = "constant" if name in self._tensors else made
        shape = "" if value.shape is None else str(value.shape)
        return f"{value.dtype.name if value.dtype is not None else 'of unknown type'}{shape}, {kind}"

    def _is_embedding(self, node: ir.Node | None) -> bool:
        """Whether it looks up rows, so that its index is an input and nothing is amiss."""
        role = None if node is None else self._roles.get(node)
        return role is not None and role.name == "embedding"

    def _role(self, node: ir.Node) -> str:
        role = self._roles.get(node)
        if role is None:
            return ""
        places = (("layer", role.layer), ("expert", role.expert))
        return ", ".join(filter(None, (role.name, *(f"{what} {index}" for what, index in places if index is not None))))


def names_of(model: ir.Model) -> list[str]:
    """Returns what can be asked for: roles, nodes and constants."""
    roles = {role.name for role in find_roles(model).values()}
    tensors = [key for graph in model.graphs() for key in graph.initializers]
    return [*sorted(roles), *(node.name for node in all_nodes(model) if node.name), *tensors]


def _spec(weight: Weight) -> str:
    block = f"blocks of {weight.block_size}" if weight.block_size else "one scale per output"
    zero = "symmetric" if weight.symmetric else "with zero points"
    role = f" ({weight.role})" if weight.role else ""
    return f"to {weight.bits} bits in {block}, {zero}, by {weight.algorithm}{role}"


def _fate(name: str, rewritten: ir.Model) -> str:
    return "stays" if any(name in graph.initializers for graph in rewritten.graphs()) else "disappears"


def _behind(first: Sequence[ir.Node]) -> set[ir.Node]:
    """The nodes, and those that read what they move, through further ones that only move it."""
    return set(walk(first, lambda node: _following(node) if node.op_type in MOVES else [], limit=None))


def _following(node: ir.Node) -> list[ir.Node]:
    return [reader for value in node.outputs for reader in readers(value)]

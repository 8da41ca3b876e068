"""One run over one model: what rules may ask of it, and what is written down about its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from rewriter.engine import purity
from rewriter.engine.proposal import Change
from rewriter.engine.weights import jobs_of, weight_record
from rewriter.facts import Facts, Transfer
from rewriter.facts.constants import constants
from rewriter.facts.types import infer_types
from rewriter.graph.contents import all_nodes, subgraphs
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.born import Look
from rewriter.quantize.formats import FORMATS
from rewriter.quantize.importance import Importance
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.measured import Measured
from rewriter.quantize.plan import AccuracyLevel, LineUse, Picking, QuantizationPlan
from rewriter.quantize.types import Calibration, Quantizer, WeightContext
from rewriter.report import Weight
from rewriter.roles import Role, find_roles
from rewriter.rule import Declined, Run
from rewriter.target import Target
from rewriter.tensors import View, names_of
from rewriter.text import natural

_NO_ROLE = Role("", None, None)


class ModelRun(Run):
    """The model, its facts and roles, the plan and the target."""

    def __init__(
        self,
        model: ir.Model,
        plan: QuantizationPlan,
        target: Target,
        quantizers: Mapping[str, Quantizer],
        importance: Importance | None = None,
        calibration: Calibration | None = None,
        *,
        rounded_activations: bool = False,
        accuracy_level: AccuracyLevel = 0,
        looks_whole: bool = False,
    ) -> None:
        self.model = model
        self.target = target
        self.rounded_activations = rounded_activations or accuracy_level == 4
        self.accuracy_level = accuracy_level
        self.looks_whole = looks_whole
        self.looks: MutableMapping[View, Look] = {}
        self._constants = Facts(model, constants)
        self._constants.compute()
        infer_types(model, self._constants)
        self._kept: dict[tuple[Transfer, ...], Facts] = {}
        self._facts = self._constants
        self._unstated: list[Change] = []
        self.readers: list[tuple[str, str]] = []
        self._named: dict[View, tuple[str, tuple[str, ...]]] = {}
        self._pickings: dict[tuple[str, str], tuple[tuple[str, ...], Picking]] = {}
        self._plan = plan
        self._quantizers = quantizers
        self.importance = importance or Importance({})
        self._calibration = calibration
        self._roles: dict[ir.Node, Role] = dict(find_roles(model, self._constants))
        self._layers = 1 + max((role.layer for role in self._roles.values() if role.layer is not None), default=-1)
        self._weights: dict[tuple[object, ...], Weight] = {}
        self.tried = ""
        """The rule that is being tried."""

    def recognise(self, recognisers: Iterable[Transfer]) -> None:
        """Offers what the rules of a phase ask for, upon what is constant: stated once, then brought up to date."""
        self._catch_up(None)
        key = tuple(recognisers)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = self._state(key)
        else:
            kept.refresh()
            if purity.is_checked():
                purity.require_same(kept, self._state(key), self.model)
        self._facts = kept

    @property
    def facts(self) -> Facts:
        """See ``rewriter.rule.Run``; what commits have touched is stated anew when somebody asks."""
        if self._unstated:
            self._catch_up(self._facts)
        return self._facts

    def _catch_up(self, asked: Facts | None) -> None:
        """States anew what commits have touched: what is constant, and what is asked for; others take note."""
        changes, self._unstated = self._unstated, []
        named = (node for change in changes for node in (*change.added, *change.rewired))
        touched = [node for node in named if node.graph is not None]
        changed = self._constants.update(touched)
        touched += (use.node for value in changed for use in value.uses())
        for facts in self._kept.values():
            (facts.update if facts is asked else facts.note)(touched)

    def _state(self, recognisers: Iterable[Transfer]) -> Facts:
        facts = Facts(self.model, recognisers, self._constants)
        facts.compute()
        return facts

    def role(self, node: ir.Node) -> Role:
        """See ``rewriter.rule.Run``."""
        return self._roles.get(node, _NO_ROLE)

    def quantize(
        self,
        weight: View,
        reader: ir.Node,
        *given: Any,
        role: str = "",
        expert: int | None = None,
    ) -> QuantizationJob:
        """See ``rewriter.rule.Run``."""
        found = self.role(reader)
        if expert is None:
            expert = weight.expert if found.expert is None else found.expert
        name, sources = self._named.get(weight) or self._named.setdefault(weight, names_of(weight))
        role = role or found.name
        node = reader.name or ""
        self.readers += [(node, known) for known in (name, weight.name, *sources)]
        layer, count = found.layer, self._layers
        pickings = [
            self._plan.picking(node=node, weight=name, role=role, layer=layer, also=(weight.name, stored), count=count)
            for stored in sources
        ]
        self._pickings[name, role] = (sources, pickings[0])
        spec, *others = dict.fromkeys(self._plan.decide(picking, role) for picking in pickings)
        if others:
            raise Declined("the plan gives the weights that are joined here different forms", reader)
        if isinstance(spec, str):
            raise Declined(spec, reader)
        activations = None if self._calibration is None else self._calibration.of(weight, expert)
        quantizer = self._quantizers[spec.algorithm]
        if quantizer is not ALGORITHMS.get(spec.algorithm):  # a user's own decides about every weight
            spec = replace(spec, lossless=False)
        context = WeightContext(
            spec=spec,
            scale_dtype=FORMATS[spec.format].scale_dtype or (given[1] if len(given) > 1 else weight.dtype.numpy()),
            weight=name,
            sources=sources,
            node=node,
            rule=self.tried,
            role=role,
            expert=expert,
            layer=layer,
            importance=self.importance.of(
                name, (*sources, weight.name), expert, weight.shape[1], role=role, layer=layer, layers=count
            ),
            activations=activations,
            uncalibrated="" if activations is not None else self._uncalibrated(reader),
        )
        return QuantizationJob(weight, context, quantizer, self._written)

    def _uncalibrated(self, reader: ir.Node) -> str:
        """Says why what a weight saw is not known."""
        if self._calibration is None:
            return "no calibration was given"
        if reader.graph is self.model.graph:
            return "the calibration holds nothing of them"
        holder = next((node.op_type for node in all_nodes(self.model) if reader.graph in subgraphs(node)), "a function")
        return f"they stand in the body of {holder}, of which no values can be captured"

    def follow(self, root: ir.Node, change: Change, roles: Mapping[ir.Value, str]) -> None:
        """Takes note of a commit: new nodes have the role of the root, or their own.

        What takes the place of whole experts has theirs.
        """
        role = self._roles.get(root)
        gone = [self._roles.pop(node) for node in change.removed if node in self._roles]
        experts = {found.layer for found in gone if found.name.startswith("expert")}
        if role is None and experts:
            role = Role("expert", experts.pop() if len(experts) == 1 else None, None)
        if role is not None:
            self._roles.update(dict.fromkeys(change.added, role))
            for value, name in roles.items():
                producer = value.producer()
                if producer is not None:
                    self._roles[producer] = replace(role, name=name)
        self._unstated.append(change)

    @property
    def roles(self) -> set[str]:
        """The roles that the model's nodes have by now, those included that a rule gave."""
        return {role.name for role in self._roles.values()}

    def plan_use(self) -> dict[tuple[str, int], LineUse]:
        """Counts what each line of the plan came to, over the weights as the model holds them by now."""
        made = [job.context for job, _ in jobs_of(self.model).values()]
        names, covered = {weight.weight for weight in made}, {source for weight in made for source in weight.sources}

        def stands(name: str, sources: tuple[str, ...]) -> bool:
            return name in names or not covered.issuperset(sources)

        asked = self._pickings.items()
        return self._plan.use(picking for (name, _), (sources, picking) in asked if stands(name, sources))

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weights that the model holds quantized, the largest error first; NaN until they have been computed."""
        jobs = [found for key, found in jobs_of(self.model).items() if key not in self._weights]
        told = [weight_record(job, Measured(nbytes, math.nan)) for job, nbytes in jobs]

        def order(weight: Weight) -> tuple[float, object]:
            return (math.inf if math.isnan(weight.relative_rms) else -weight.relative_rms), natural(weight.name)

        return tuple(sorted([*told, *self._weights.values()], key=order))

    def recorded(self, job: QuantizationJob) -> Weight | None:
        """Returns what is known of a weight since it was computed, None where it was not."""
        return self._weights.get(job.key)

    def _written(self, job: QuantizationJob, measured: Measured) -> None:
        self._weights[job.key] = weight_record(job, measured)

"""Follows ``extends`` from source to source and lays the documents over each other, rules bound."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rewriter.errors import RuleSetError, nearest
from rewriter.quantize.plan import Override, QuantizationPlan, Selector
from rewriter.ruleset.catalogue import bind, describe
from rewriter.ruleset.discover import GROUP, RuleOffer, SetOffer, reason, require_only, rule_offers, set_offers
from rewriter.ruleset.document import QuantizationDocument, RuleSetDocument, SelectorDocument, read
from rewriter.ruleset.model import BoundRule, Phase, RuleSet
from rewriter.ruleset.source import Location, Source, parse_yaml

Fail = Callable[[str], RuleSetError]
_SUFFIXES = (".yaml", ".yml")
_DEEPEST = 32
_MOST = 256
_Layers = dict[str, tuple[Source, RuleSetDocument]]


@dataclass
class Reader:
    """Reads rule sets against what is installed now."""

    rules: dict[str, RuleOffer] = field(default_factory=rule_offers)
    sets: dict[str, SetOffer] = field(default_factory=set_offers)

    def find(self, name: str | os.PathLike[str], folder: Path | None, fail: Fail = RuleSetError) -> Source:
        """Returns the shipped rule set, or the file, of this name.

        Args:
            name: a shipped id, or a path: anything with a directory or the suffix ``.yaml`` or ``.yml``.
            folder: what a relative path is relative to; None where only ids may be named.
            fail: makes the error for a name that leads nowhere.

        Raises:
            RuleSetError: nothing has this name, or the file is not YAML.
        """
        is_path = not isinstance(name, str) or len(Path(name).parts) > 1 or name.endswith(_SUFFIXES)
        if not is_path and name in self.sets:
            return shipped(self.sets[name])
        if folder is None or not (is_path or _is_file(folder / name)):
            raise fail(f"unknown rule set '{name}'{nearest(str(name), self.sets) or self._nothing_installed()}")
        path = folder / name
        try:
            if path.exists() and not path.is_file():  # reading a pipe would wait without end
                raise fail(f"rule set file '{path}' is not a regular file")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise fail(f"rule set file '{path}' does not exist") from error
        except UnicodeDecodeError as error:
            raise fail(f"rule set file '{path}' is not text in UTF-8; give a YAML file") from error
        except (OSError, ValueError) as error:
            raise fail(f"rule set file '{path}' cannot be read: {reason(error)}") from error
        return parse_yaml(text, str(path), path.parent)

    def build(self, name: str, source: Source) -> RuleSet:
        """Reads the source and all that it extends, each once, and lays them over each other."""
        layers: _Layers = {}
        self._collect(source, (), layers)
        ruleset = RuleSet(name)
        for part, document in layers.values():
            ruleset = self.extend(ruleset, part, document)
        return ruleset

    def _collect(self, source: Source, chain: tuple[Source, ...], layers: _Layers) -> None:
        document = read(source)
        chain = (*chain, source)
        for index, name in enumerate(document.extends):

            def fail(message: str, index: int = index) -> RuleSetError:
                return source.error(("extends", index), message)

            if len(chain) > _DEEPEST or len(layers) > _MOST:
                raise fail(f"extends more than {_DEEPEST} rule sets one by way of the other, or {_MOST} in all")
            if (
                name not in self.sets
                and not name.endswith(_SUFFIXES)
                and (os.sep in name or _is_file((source.folder or Path()) / name))
            ):
                raise fail(f"a rule set file that is extended ends in .yaml, and '{name}' does not")
            base = self.find(name, source.folder, fail)
            if base.identity in (part.identity for part in chain):
                raise fail(f"extends cycle: {' -> '.join(part.label for part in (*chain, base))}")
            if base.identity not in layers:
                self._collect(base, chain, layers)
        layers[source.identity] = (source, document)

    def extend(self, base: RuleSet, source: Source, document: RuleSetDocument) -> RuleSet:
        """Lays what the document gives over a rule set."""
        given = document.given()
        return replace(
            base,
            description=given.get("description", base.description),
            target=given.get("target", base.target),
            rounded_activations=given.get("rounded_activations", base.rounded_activations),
            accuracy_level=given.get("accuracy_level", base.accuracy_level),
            phases=self._phases(base.phases, source, document),
            plan=_plan(base.plan, source, document.quantization),
            parity=replace(base.parity, **document.parity.given()),
        )

    def _phases(self, base: Sequence[Phase], source: Source, document: RuleSetDocument) -> tuple[Phase, ...]:
        phases = {phase.name: phase for phase in base}
        own: set[str] = set()
        for i, phase in enumerate(document.phases):
            if phase.name in own:
                raise source.error(("phases", i, "name"), f"duplicate phase '{phase.name}'")
            own.add(phase.name)
            rules = tuple(
                self.bind(rule.name, rule.options, source, ("phases", i, "rules", j))
                for j, rule in enumerate(phase.rules)
            )
            phases[phase.name] = Phase(phase.name, rules, phase.max_sweeps)
        return self._with_options(tuple(phases.values()), source, document.options)

    def _with_options(
        self, phases: tuple[Phase, ...], source: Source, options: Mapping[str, Mapping[str, object]]
    ) -> tuple[Phase, ...]:
        listed = {rule.name for phase in phases for rule in phase.rules}
        for name in options:
            if name not in listed:
                hint = nearest(name, listed)
                raise source.error(("options", name), f"no phase lists a rule '{name}'{hint}", key=True)

        def bound(rule: BoundRule) -> BoundRule:
            if rule.name not in options:
                return rule
            return self.bind(rule.name, {**rule.options, **options[rule.name]}, source, ("options",))

        return tuple(replace(phase, rules=tuple(map(bound, phase.rules))) for phase in phases)

    def bind(self, name: str, options: Mapping[str, object], source: Source, location: Location) -> BoundRule:
        """Returns the installed rule of this id with its options.

        Raises:
            RuleSetError: no such rule, or wrong options.
        """
        if name not in self.rules:
            hint = nearest(name, self.rules) or self._nothing_installed()
            raise source.error((*location, name), f"unknown rule '{name}'{hint}", key=True)
        return bind(describe(self.rules[name]), options, source, location)

    def _nothing_installed(self) -> str:
        return "" if self.rules else f" (no installed package offers rules: entry-point group {GROUP})"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, or a directory that may not be looked into
        return False


def shipped(offer: SetOffer) -> Source:
    """Reads a shipped rule set.

    Raises:
        RuleSetError: the file cannot be read or is not YAML, or several packages offer the set.
    """
    require_only(offer)
    try:
        text = offer.path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RuleSetError(f"rule set file '{offer.path}' cannot be read: {reason(error)}") from error
    return parse_yaml(text, offer.label)


def _plan(base: QuantizationPlan, source: Source, document: QuantizationDocument) -> QuantizationPlan:
    def selectors(name: str, entries: Sequence[SelectorDocument]) -> tuple[Selector, ...]:
        return tuple(entry.selector(source.where(("quantization", name, i))) for i, entry in enumerate(entries))

    dropped = selectors("drop", document.drop)
    inherited = (*base.include, *base.exclude)
    for i, entry in enumerate(dropped):
        if entry not in inherited:
            hint = nearest(str(entry), map(str, inherited)) or " (it has none)"
            reason = f"what this rule set extends has no entry '{entry}' in include or exclude{hint}"
            raise source.error(("quantization", "drop", i), reason)
    overrides = zip(selectors("overrides", document.overrides), document.overrides, strict=True)
    return QuantizationPlan(
        default=replace(base.default, **document.default.given()),
        include=(*(s for s in base.include if s not in dropped), *selectors("include", document.include)),
        exclude=(*(s for s in base.exclude if s not in dropped), *selectors("exclude", document.exclude)),
        overrides=(*base.overrides, *(Override(selector, entry.changes()) for selector, entry in overrides)),
    )

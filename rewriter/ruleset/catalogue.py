"""What each rule says of itself in its docstring, and how options bind to the signature of its ``rule`` function."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, TypeAdapter

from rewriter.errors import RuleSetError, nearest
from rewriter.ruleset.discover import RuleOffer, import_or_raise, reason, require_only, rule_offers, skip
from rewriter.ruleset.faults import validated
from rewriter.ruleset.fields import exact
from rewriter.ruleset.model import BoundRule, Rule
from rewriter.ruleset.source import Location, Source
from rewriter.text import names

SECTIONS = ("Matched", "Replacement", "Declines when", "Source")

_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):(.*)")
_ARGUMENT = re.compile(r"\s+(\w+)(?: \([^)]*\))?: (.*)")


@dataclass(frozen=True)
class OptionInfo:
    """An option of a rule.

    Attributes:
        name: the parameter's name.
        type: what YAML may give, as people say it.
        default: its value when not given.
        description: its line in the ``Args`` of the ``rule`` function; empty where it has none.
        adapter: validates a value, strictly.
    """

    name: str
    type: str
    default: object
    description: str
    adapter: TypeAdapter[Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class RuleInfo:
    """A rule as the catalogue shows it.

    Attributes:
        name: its id.
        package: the package that offers it.
        title: first line of its module's docstring.
        sections: the docstring's sections by title: Matched, Replacement, Declines when, Source.
        options: what YAML may set.
        factory: makes the rule from its options.
    """

    name: str
    package: str
    title: str
    sections: Mapping[str, str]
    options: tuple[OptionInfo, ...]
    factory: Callable[..., object] = field(repr=False, compare=False)


def catalogue() -> tuple[RuleInfo, ...]:
    """Returns every rule that is installed, by id; with a warning, without those that cannot be used."""
    found = []
    for _, offer in sorted(rule_offers().items()):
        try:
            found.append(describe(offer))
        except RuleSetError as error:
            skip(f"a rule of package '{offer.package}'", str(error))
    return tuple(found)


def describe(offer: RuleOffer) -> RuleInfo:
    """Imports a rule's module and reads its docstring and options.

    Raises:
        RuleSetError: the module cannot be imported or breaks the contract of a rule module, or several packages offer
            the rule.
    """
    require_only(offer)
    what = f"rule {offer.name} ({offer.module})"
    module = import_or_raise(offer.module, what)
    factory = getattr(module, "rule", None)
    if not inspect.isfunction(factory):
        raise RuleSetError(f"{what} has no function 'rule'")
    title, sections = _sections(inspect.cleandoc(module.__doc__ or ""))
    if not title:
        raise RuleSetError(f"{what} has no docstring")
    return RuleInfo(offer.name, offer.package, title, sections, _options(factory, what), factory)


def bind(info: RuleInfo, options: Mapping[str, object], source: Source, location: Location) -> BoundRule:
    """Validates options against a rule's signature and makes the rule.

    Args:
        info: the rule.
        options: as the source gives them.
        source: where they come from.
        location: the rule's entry in the source.

    Raises:
        RuleSetError: an unknown option, a wrong type, or the rule refuses the options.
    """
    known = {option.name: option for option in info.options}
    values = {option.name: option.default for option in info.options}
    inner = (*location, info.name)
    for name, value in options.items():
        place = (*inner, name)
        if name not in known:
            hint = nearest(str(name), known) or " (it has none)"
            raise source.error(place, f"unknown option '{name}' of rule {info.name}{hint}", key=True)
        validate = functools.partial(known[name].adapter.validate_python, value)
        values[name] = validated(source, place, validate)
    try:
        made = info.factory(**values)
    except (Exception, SystemExit) as error:
        raise source.error(inner, f"rule {info.name} refuses its options: {reason(error)}") from error
    rules = tuple(made) if isinstance(made, Sequence) else (made,)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise source.error(inner, f"rule {info.name} made a {type(rule).__name__}, not an onnxscript rule")
    return BoundRule(info.name, values, rules)


def _options(factory: Callable[..., object], what: str) -> tuple[OptionInfo, ...]:
    try:
        hints = typing.get_type_hints(factory, include_extras=True)
    except Exception as error:
        raise RuleSetError(f"{what}: an annotation of 'rule' cannot be read: {reason(error)}") from error
    texts = _arguments(inspect.getdoc(factory) or "")
    options = []
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty or name not in hints:
            raise RuleSetError(f"{what}: option '{name}' must be keyword-only, with an annotation and a default")
        type_text = _type_text(hints[name])
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(_strict(hints[name]), config=ConfigDict(strict=True))
        except TypeError as error:
            raise RuleSetError(f"{what}: option '{name}' has a type that YAML cannot give: {type_text}") from error
        options.append(OptionInfo(name, type_text, parameter.default, texts.get(name, ""), adapter))
    return tuple(options)


def _strict(annotation: Any) -> Any:
    """Returns the annotation with what strict validation of YAML lacks.

    Raises:
        TypeError: YAML cannot give such a value.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float, bool, str, NoneType):
        return annotation
    if origin is Literal:
        return Annotated[annotation, exact(annotation)]
    if origin in (typing.Union, UnionType):
        return typing.Union[tuple(map(_strict, args))]  # noqa: UP007  # built from a list
    if origin is list:
        return GenericAlias(list, (_strict(args[0]),))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        item = _strict(args[0])
        as_tuple = BeforeValidator(_as_tuple, json_schema_input_type=GenericAlias(list, (item,)))
        return Annotated[GenericAlias(tuple, (item, ...)), as_tuple]
    raise TypeError


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _type_text(annotation: Any) -> str:
    """Returns what YAML may give: ``raw, columns or null``."""
    return names(_given(annotation), "or")


def _given(annotation: Any) -> list[str]:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is NoneType:
        return ["null"]
    if origin is Literal:
        return ["null" if value is None else str(value) for value in args]
    if origin in (typing.Union, UnionType):
        return [text for arg in args for text in _given(arg)]
    if origin in (list, tuple):
        return [f"a list of {_type_text(args[0])}"]
    return [annotation.__name__ if isinstance(annotation, type) else repr(annotation).replace("typing.", "")]


def _sections(docstring: str) -> tuple[str, dict[str, str]]:
    title, *lines = docstring.splitlines() or [""]
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        found = _SECTION.fullmatch(line)
        if found:
            current = sections[found[1]] = [found[2]]
        else:
            current.append(line)
    return title.strip(), {name: inspect.cleandoc("\n".join(body)) for name, body in sections.items()}


def _arguments(docstring: str) -> dict[str, str]:
    block = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    return {found[1]: found[2] for found in map(_ARGUMENT.fullmatch, block.splitlines()) if found}

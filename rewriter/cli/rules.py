"""``rewriter rules``: the catalogue of rules and rule sets, from their own docstrings and files."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli import options
from rewriter.cli.options import AsJson
from rewriter.errors import UsageError, nearest

if TYPE_CHECKING:
    from rewriter.ruleset import OptionInfo, RuleInfo, RuleSetInfo


def rules(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RULE|SET",
            show_default=False,
            help="Show this one in full.",
            autocompletion=options.complete_rules_and_sets,
        ),
    ] = None,
    as_json: AsJson = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of rule sets, with every installed rule.")
    ] = False,
) -> None:
    """List the installed rules and rule sets, or show one of them in full.

    [bold]rewriter rules[/bold]
        the catalogue
    [bold]rewriter rules matmul-to-matmul-nbits[/bold]
        what it matches, what it puts there, when it declines, its options
    [bold]rewriter rules --schema > ruleset.schema.json[/bold]
        lets an editor check and complete rule sets
    """
    from rewriter.cli.console import console
    from rewriter.ruleset import catalogue, rule_sets, schema_text

    if schema:
        if name is not None or as_json:
            raise UsageError("--schema goes with neither a name nor --json")
        console().out(schema_text(), end="")
        return
    known = {info.name: info for info in catalogue()}
    sets = rule_sets()
    if name is not None and name not in known and name not in sets:
        raise UsageError(f"there is no rule or rule set '{name}'{nearest(name, {*known, *sets})}")
    if as_json:
        console().out(json.dumps(_json(known, sets, name), indent=2))
    elif name is None:
        _list(known, sets)
    else:
        # A rule and a rule set may have one name, as unstack has.
        if name in known:
            _show_rule(known[name])
        if name in sets:
            _show_set(sets[name])


def _list(known: dict[str, RuleInfo], sets: dict[str, RuleSetInfo]) -> None:
    from rewriter.cli.console import Sheet, console, show
    from rewriter.facts.outside import load_recognisers

    rows = Sheet("Rules", "|rule", "what it does")
    for info in known.values():
        rows.add(info.name, info.title)
    named = Sheet("Rule sets", "|rule set", "description")
    for entry in sets.values():
        named.add(entry.name, entry.description)
    show(console(), rows, named)
    if outside := load_recognisers():
        console().print(f"Recognisers of other packages: {', '.join(outside)}")
    console().print("rewriter rules NAME shows one in full, with its options", style="dim")


def _show_rule(info: RuleInfo) -> None:
    from rich.text import Text

    from rewriter.cli.console import Sheet, console, show

    out = console()
    out.print(Text.assemble((info.name, "bold"), (f"  rule, from package {info.package}", "dim")))
    out.print(info.title)
    out.print()
    for title, body in info.sections.items():
        out.print(title, style="bold")
        for line in body.replace("``", "").splitlines():
            out.print(textwrap.fill(line, out.width, initial_indent="  ", subsequent_indent=" " * 6), soft_wrap=True)
        out.print()
    if info.options:
        rows = Sheet("Options", "|option", "type", "default", "meaning")
        for option in info.options:
            rows.add(option.name, option.type, _yaml(option.default), option.description or "-")
        show(out, rows)


def _show_set(entry: RuleSetInfo) -> None:
    from rich.text import Text

    from rewriter.cli.console import Sheet, console, labelled, show
    from rewriter.quantize.lossless import show as show_form
    from rewriter.ruleset import load

    out = console()
    out.print(Text.assemble((entry.name, "bold"), (f"  rule set, from package {entry.package}", "dim")))
    out.print(entry.description)
    out.print()
    rows = Sheet("Phases", "|phase", "|rule", "options")
    rule_set = load(entry.name)
    for phase in rule_set.phases:
        for index, rule in enumerate(phase.rules):
            given = ", ".join(f"{key}: {_yaml(value)}" for key, value in rule.options.items())
            rows.add("" if index else phase.name, rule.name, given or "-")
    show(out, rows)
    plan, parity = rule_set.plan, rule_set.parity
    facts = []
    if rule_set.quantizes:
        facts.append(("plan", f"{show_form(plan.default)}, {plan.default.algorithm}"))
    facts += [("only", str(selector)) for selector in plan.include] + [("except", str(s)) for s in plan.exclude]
    facts += [("override", f"{o.selector}: {dict(o.changes)}") for o in plan.overrides]
    if rule_set.rounded_activations or rule_set.accuracy_level:
        told = f"rounded {str(rule_set.rounded_activations).lower()}, accuracy_level {rule_set.accuracy_level}"
        facts.append(("activations", told))
    facts += [("parity", f"local {parity.local}"), ("target", rule_set.target), ("file", entry.path)]
    for key, value in facts:
        out.print(labelled(key, value, 10), soft_wrap=True)


def _json(known: dict[str, RuleInfo], sets: dict[str, RuleSetInfo], name: str | None) -> dict[str, Any]:
    from rewriter.report import SCHEMA_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        "rules": [
            {
                "name": info.name,
                "package": info.package,
                "title": info.title,
                "sections": dict(info.sections),
                "options": [_option(option) for option in info.options],
            }
            for info in known.values()
            if name in (None, info.name)
        ],
        "rule_sets": [
            {"name": entry.name, "package": entry.package, "description": entry.description, "path": entry.path}
            for entry in sets.values()
            if name in (None, entry.name)
        ],
    }


def _option(option: OptionInfo) -> dict[str, Any]:
    return {
        "name": option.name,
        "type": option.type,
        "default": option.default,
        "description": option.description,
        "schema": option.adapter.json_schema(),
    }


def _yaml(value: object) -> str:
    return json.dumps(value, default=str)

"""The pages of rule sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generator.markdown import as_yaml, code, own_rules, own_sets, prose, table, written
from rewriter.roles import __doc__ as roles_doc
from rewriter.ruleset.load import rule_sets
from rewriter.ruleset.model import RuleSet
from rewriter.ruleset.schema import json_schema


def schema_reference() -> str:
    """Returns the keys of a rule set, from its JSON Schema."""
    schema = json_schema(rules=False)
    definitions = schema["$defs"]
    parts = [("A rule set", schema)]
    named = {
        "An entry of `phases`": "PhaseDocument",
        "`quantization`": "QuantizationDocument",
        "`quantization.default`": "SpecDocument",
        "A selector: an entry of `include` or `exclude`": "SelectorDocument",
        "An entry of `overrides`: a selector and the values that it changes": "OverrideDocument",
        "`parity`": "ParityDocument",
    }
    if set(named.values()) != set(definitions):
        raise SystemExit(f"the schema has other parts than this page names: {sorted(definitions)}")
    parts += [(title, definitions[name]) for title, name in named.items()]
    return "\n".join(f"### {title}\n\n{_keys(part)}" for title, part in parts)


def _keys(part: Mapping[str, Any]) -> str:
    required = part.get("required", ())
    rows = [
        [
            code(name),
            _type(entry),
            "required" if name in required else code(as_yaml(entry["default"])) if "default" in entry else "-",
            entry.get("description", ""),
        ]
        for name, entry in part["properties"].items()
    ]
    return table(("key", "type", "default", "meaning"), rows)


def _type(entry: Mapping[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(code(as_yaml(value).strip('"')) for value in entry["enum"])
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_type(option) for option in entry["anyOf"]))
    if "$ref" in entry or entry.get("type") == "object":
        return "mapping"
    if entry.get("type") == "array":
        inner = _type(entry["items"])
        return f"list of {inner if 'or' not in inner else f'({inner})'}"
    return str(entry.get("type", "any"))


def sets_index() -> str:
    """Returns a table of the shipped rule sets."""
    sets = own_sets()
    return table(("rule set", "what it promises"), [[f"[{n}](#{n})", s.description] for n, s in sets.items()])


def readme_sets() -> str:
    """Returns the same table with links that work from the README."""
    return sets_index().replace("](#", "](docs/rule-sets.md#")


def sets_catalogue() -> str:
    """Returns every shipped rule set: its file, and what it comes to with all that it extends."""
    infos = rule_sets()
    return "\n".join(_set(name, Path(infos[name].path), rule_set) for name, rule_set in own_sets().items())


def _set(name: str, path: Path, rule_set: RuleSet) -> str:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# yaml-language")]
    phases = "; ".join(
        f"{phase.name}: {', '.join(f'[{r.name}](rules.md#{r.name}){_changed(r.options, r.name)}' for r in phase.rules)}"
        for phase in rule_set.phases
    )
    spec = rule_set.plan.default
    zero = "symmetric" if spec.symmetric else "with zero points"
    base = written(name).get("extends")
    same = isinstance(base, str) and own_sets()[base].phases == rule_set.phases
    facts = [f"Runs what [{base}](#{base}) runs." if same else f"Runs {phases}."]
    if "quantization" in _effective(name):
        facts.append(f"Weights: {spec.bits} bits, blocks of {spec.block_size}, {zero}, `{spec.algorithm}`.")
    facts += [f"Only {selector}." for selector in rule_set.plan.include]
    facts += [f"Except {selector}." for selector in rule_set.plan.exclude]
    facts += [
        f"Override for {o.selector}: {', '.join(f'{k} {as_yaml(v)}' for k, v in o.changes.items())}."
        for o in rule_set.plan.overrides
    ]
    listed = "".join(f"- {fact}\n" for fact in facts)
    text = "\n".join(lines)
    return f"### {name}\n\n{rule_set.description}\n\n```yaml\n{text}\n```\n\nWith all that it extends:\n\n{listed}"


def _effective(name: str) -> set[str]:
    """Keys that the set, or one that it extends, writes."""
    document = written(name)
    bases = document.get("extends", [])
    inherited = [_effective(base) for base in ([bases] if isinstance(bases, str) else bases)]
    return set(document).union(*inherited)


def _changed(options: Mapping[str, object], rule: str) -> str:
    defaults = {option.name: option.default for info in own_rules() if info.name == rule for option in info.options}
    changed = [f"{key}: {as_yaml(value)}" for key, value in options.items() if value != defaults[key]]
    return f" ({', '.join(changed)})" if changed else ""


def roles() -> str:
    """Returns the names of the roles, as the code describes them."""
    told = (roles_doc or "").partition("Roles:")
    return prose("".join(told[1:])).strip() + "\n"

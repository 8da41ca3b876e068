"""The pages of rules."""

from __future__ import annotations

from generator.markdown import as_yaml, code, own_rules, own_sets, prose, table, written
from rewriter.ruleset.catalogue import OptionInfo, RuleInfo


def rules_index() -> str:
    """Returns a table of the rules, each with the sets that list it themselves."""
    users: dict[str, list[str]] = {info.name: [] for info in own_rules()}
    for name in own_sets():
        phases = written(name).get("phases", [])
        listed = (
            entry if isinstance(entry, str) else next(iter(entry)) for phase in phases for entry in phase["rules"]
        )
        for rule in dict.fromkeys(listed):
            users[rule].append(f"[{name}](rule-sets.md#{name})")
    rows = [[f"[{i.name}](#{i.name})", prose(i.title), ", ".join(users[i.name]) or "none"] for i in own_rules()]
    return table(("rule", "what it does", "listed in"), rows)


def rules_catalogue() -> str:
    """Returns every rule in full."""
    return "\n".join(_rule(info) for info in own_rules())


def _rule(info: RuleInfo) -> str:
    module = f"{info.name.replace('-', '_')}.py"
    parts = [f"## {info.name}\n", f"{prose(info.title)} ([source](../rules/{module}))\n"]
    for title, body in info.sections.items():
        if title == "Declines when":
            listed = "".join(f"- {prose(line)}\n" for line in _joined(body))
            parts.append(f"{title}:\n\n{listed}")
        elif title == "Source":
            parts.append(f"{title}: {prose(' '.join(body.split()))}\n")
        else:
            parts.append(f"{title}:\n\n```text\n{body.replace('``', '')}\n```\n")
    if info.options:
        rows = [[code(o.name), code(o.type), code(as_yaml(o.default)), prose(_said(o))] for o in info.options]
        parts.append(f"Options:\n\n{table(('option', 'type', 'default', 'meaning'), rows)}")
    else:
        parts.append("It has no options.\n")
    return "\n".join(parts)


def _said(option: OptionInfo) -> str:
    if not option.description:
        raise SystemExit(f"option '{option.name}' has no line in the Args of its rule function")
    return option.description


def _joined(body: str) -> list[str]:
    """One line per guard; a guard may go on in an indented line."""
    lines: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and lines:
            lines[-1] += f" {line.strip()}"
        elif line.strip():
            lines.append(line.strip())
    return lines

"""Writes the generated parts of the documentation: ``python docs/generate.py``; with ``--check`` it only compares.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; the rest is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from generator import blocks, forms, harness, printed, rules, sets, targets

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_PART = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

PARTS: Mapping[str, Callable[[], str]] = {
    "attributes": targets.attributes,
    "blocks": blocks.fused,
    "facts": harness.facts,
    "experts-on-cpu": targets.experts_on_cpu,
    "faults": targets.faults,
    "forms": forms.forms,
    "kernels": targets.kernels,
    "linears": targets.linears,
    "lookups": targets.lookups,
    "measurements": targets.measurements,
    "picture": printed.picture,
    "profiles": harness.profiles,
    "promises": harness.promised,
    "quick-start": printed.quick_start,
    "readme-sets": sets.readme_sets,
    "roles": sets.roles,
    "rules": rules.rules_catalogue,
    "rules-index": rules.rules_index,
    "schema": sets.schema_reference,
    "selections": forms.selections,
    "sets": sets.sets_catalogue,
    "sets-index": sets.sets_index,
    "strategies": harness.strategies,
    "unmeasured": targets.unmeasured,
}


def generated(text: str) -> str:
    """Returns a page with its generated parts written anew.

    Raises:
        SystemExit: a part has no generator.
    """

    def part(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        if name not in PARTS:
            raise SystemExit(f"nothing generates '{name}'")
        return f"{begin}\n{PARTS[name]()}\n{end}"

    return _PART.sub(part, text)


def main(check: bool) -> int:
    """Writes the pages that changed, or says which would.

    Args:
        check: whether to write nothing.

    Returns:
        The exit code: 1 where a page is stale and was only checked.
    """
    stale = 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = generated(old)
        if new != old:
            stale += 1
            sys.stdout.write(f"{'stale' if check else 'wrote'}: {page.relative_to(ROOT)}\n")
            if not check:
                page.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))

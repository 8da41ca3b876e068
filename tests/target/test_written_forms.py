"""Every form that the rules write for a measured target is one that was measured there, and right."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from emission import sweep
from generator.measured import ROUNDS, measured, target_of, told
from generator.targets import unmeasured_parts
from generator.verdicts import Verdicts
from probe.forms import text_of

PATCHES = defaultdict(list)
for answers in measured():
    PATCHES[str(target_of(answers))].append(answers)


@pytest.mark.parametrize("name", PATCHES)
def test_what_is_written_was_measured_and_is_right(name, record_property):
    """``python tests/target/emission.py NAME`` prints what is to be measured, for the prober's ``--forms``.

    Marked: docs/targets.md says of which part of it nothing was measured. Named: an MoE on its way to QMoE, of which
    the report says that the target does not run it.
    """
    patches = PATCHES[name]
    target, verdicts, written = target_of(patches[0]), Verdicts.of(patches), sweep(patches[0])
    marked = unmeasured_parts(patches[-1])
    counts, bad = Counter(), []
    for form, own in written.items():
        known = verdicts.known(form)
        if known == "unmeasured" and set(verdicts.unmeasured(form)) <= set(marked):
            known = "marked"
        elif known not in ("right", "rounds", "in parts", "unmeasured") and own.named and form.operator == "MoE":
            known = "named"
        counts[known] += 1
        rounds = known == "rounds" and told(target, form) != ROUNDS
        if rounds or known not in ("right", "rounds", "in parts", "marked", "named"):
            bad.append(f"{text_of(form)}: {known}, written by {own.rule}")
    assert not bad, f"{len(bad)} of {len(written)} forms for {name}:\n" + "\n".join(sorted(bad))
    record_property("written forms", [name, len(written), dict(counts)])

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


STEPS = {
    # Until 1.31, whose MoE adds to what it has not cleared.
    "MoE normalize=0 h=128 i=128",
    "MoE bias=all normalize=0 h=128 i=128",
    "MoE x=FLOAT16 normalize=0 h=128 i=128",
    "MoE x=FLOAT16 bias=all normalize=0 h=128 i=128",
    "MoE x=FLOAT16 normalize=0 rank=3 h=128 i=128",
    # Of 1.32, which has no MoE in bfloat16.
    "MoE x=BFLOAT16 h=128 i=128",
    "MoE x=BFLOAT16 bias=all h=128 i=128",
    "MoE x=BFLOAT16 normalize=0 h=128 i=128",
    "MoE x=BFLOAT16 bias=all normalize=0 h=128 i=128",
}
"""Of the CPU, MoE on the way to QMoE or from it: the report says of each node that the target does not run it."""


@pytest.mark.parametrize("name", PATCHES)
def test_what_is_written_was_measured_and_is_right(name, record_property):
    """``python tests/target/emission.py NAME`` prints what is to be measured, for the prober's ``--forms``.

    On the CPU each form itself, but for those that a report names as not running there. On CUDA in parts: each part of
    it is right in another form. Marked: docs/targets.md says of which part of it nothing was measured.
    """
    patches = PATCHES[name]
    target, verdicts, written = target_of(patches[0]), Verdicts.of(patches), sweep(patches[0])
    marked = unmeasured_parts(patches[-1])
    known_by = ("right", "rounds") if target.provider == "cpu" else ("right", "rounds", "in parts", "marked")
    counts, bad = Counter(), []
    for form, own in written.items():
        known = verdicts.known(form)
        if known == "unmeasured" and set(verdicts.unmeasured(form)) <= set(marked):
            known = "marked"
        elif known not in known_by and own.named and text_of(form) in STEPS:
            known = "named"
        counts[known] += 1
        rounds = known == "rounds" and told(target, form) != ROUNDS
        if rounds or known not in (*known_by, "named"):
            bad.append(f"{text_of(form)}: {known}, written by {own.rule}")
    assert not bad, f"{len(bad)} of {len(written)} forms for {name}:\n" + "\n".join(sorted(bad))
    record_property("written forms", [name, len(written), dict(counts)])

"""The tables of targets say what the prober measured: nothing that a runtime computes wrongly, and all that it does."""

from __future__ import annotations

import functools

import pytest
from generator.measured import ROUNDS, RUNS, measured, target_of, told
from probe.forms import text_of

CAUTIOUS = {("cpu", (1, 24)): "the target has no kernel for 4 bits in blocks of "}
"""Reasons that say more than was measured: 1.24.1 runs other blocks with zero points, and misreads them without."""
GOOD = {"right": (RUNS, ROUNDS), "rounds": (ROUNDS,)}


@functools.cache
def right_in_every_patch():
    """(Provider, minor version) -> forms that are right in every patch of it that was measured, as a target is all."""
    found = {}
    for own in measured():
        right = {answer.form for answer in own.answers if answer.verdict(own.provider) == "right"}
        key = own.provider, target_of(own).version
        found[key] = found.get(key, right) & right
    return found


@pytest.mark.parametrize("found", measured(), ids=lambda found: f"{found.provider}-{found.version}")
def test_the_tables_say_what_was_measured(found):
    wrong, refused = [], []
    release = found.provider, target_of(found).version
    right, cautious = right_in_every_patch()[release], CAUTIOUS.get(release)
    for answer in found.answers:
        said = told(target_of(found), answer.form)
        if said is None:
            continue
        verdict = answer.verdict(found.provider)
        shown = f"{text_of(answer.form)}: {verdict} {answer.error or answer.why[:60]} | {said}"
        if said in (RUNS, ROUNDS) and said not in GOOD.get(verdict, ()):
            wrong.append(shown)
        elif said not in (RUNS, ROUNDS) and answer.form in right and not (cautious and said.startswith(cautious)):
            refused.append(shown)
    assert not wrong, f"{len(wrong)} that the tables accept:\n" + "\n".join(wrong)
    assert not refused, f"{len(refused)} that the tables decline:\n" + "\n".join(refused)


def test_every_release_of_the_cpu_provider_was_measured():
    versions = sorted({target_of(found).version for found in measured() if found.provider == "cpu"})
    assert versions == [(1, minor) for minor in range(versions[0][1], versions[-1][1] + 1)]
    assert versions[-1] == (1, 32)

"""The tables of targets say what the prober measured: nothing that a runtime computes wrongly, and all that it does."""

from __future__ import annotations

import pytest
from generator.measured import ROUNDS, RUNS, measured, target_of, told
from probe.forms import text_of

GOOD = {"right": (RUNS, ROUNDS), "rounds": (ROUNDS,)}


@pytest.mark.parametrize("found", measured(), ids=lambda found: str(target_of(found)))
def test_the_tables_say_what_was_measured(found):
    wrong, refused = [], []
    for answer in found.answers:
        said = told(target_of(found), answer.form)
        if said is None:
            continue
        verdict = answer.verdict(found.provider)
        shown = f"{text_of(answer.form)}: {verdict} {answer.error or answer.why[:60]} | {said}"
        if said in (RUNS, ROUNDS) and said not in GOOD.get(verdict, ()):
            wrong.append(shown)
        elif said not in (RUNS, ROUNDS) and verdict == "right":
            refused.append(shown)
    assert not wrong, f"{len(wrong)} that the tables accept:\n" + "\n".join(wrong)
    assert not refused, f"{len(refused)} that the tables decline:\n" + "\n".join(refused)


def test_every_release_of_the_cpu_provider_was_measured():
    versions = [target_of(found).version for found in measured() if found.provider == "cpu"]
    assert versions == [(1, minor) for minor in range(versions[0][1], versions[-1][1] + 1)]
    assert versions[-1] == (1, 32)

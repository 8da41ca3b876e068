"""Every deliberately wrong version of a shipped rule is caught, and what catches it is named."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from mistakes import Mistake, codes, made
from rule_models import rule_of
from wrong_experts import EXPERTS
from wrong_formats import FORMATS
from wrong_guards import GUARDS
from wrong_linears import LINEARS
from wrong_operators import OPERATORS
from wrong_tables import TABLES

from rewriter.ruleset.discover import rule_offers
from rewriter.testing import check_rule, near_misses

MISTAKES: tuple[Mistake, ...] = (*LINEARS, *EXPERTS, *OPERATORS, *FORMATS, *TABLES, *GUARDS)
FEW = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
CAUGHT = {
    r"failed its parity: .* is to take its place does not run": "local proof: the result does not run",
    r"failed its parity": "local proof: outputs differ",
    r"quantizes what it did not match": "local proof: it declines where the rule should have",
    r"raised QuantizationError: .* do not read back": "layout: bytes do not come back",
    r"raised QuantizationError": "layout: the weight does not fit",
    r"would be nearer": "codes: not the nearest to the weight",
    r"is part of a constant whose parts": "sizes: a constant is copied and stays",
    r"its float weight '.*' is quantized too": "leftovers: a quantized weight stays in float",
    r"lost a reader and is left in the model": "leftovers: a weight stays beside what was made of it",
    r"output '.*' (is|differs|has shape)": "whole model: outputs differ",
    r"runs the model's operators and not the result's": "target: runs the result as something else",
    r"the model runs and the result does not": "whole model: the result does not run",
    r"the checker accepts the model": "checker: the result is invalid",
    r"fires again": "second run: not idempotent",
    r"raised RuleError: .* changed the model while it was matched": "purity: a match edits the model",
    r"raised RuleError": "engine: the rule fails",
}
"""What the first line of a complaint says -> what caught it."""


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.rule}: {m.name}")
def test_a_wrong_rule_is_caught(mistake, record_property):
    models = mistake.models()
    hold, few = (near_misses, settings(FEW, max_examples=200)) if mistake.guard else (check_rule, FEW)
    with made(mistake), pytest.raises(AssertionError) as complaint:
        hold(mistake.given or rule_of(mistake.rule), models, settings=few)
    near, first = _split(str(complaint.value))
    caught = [name for said, name in CAUGHT.items() if re.search(said, first)]
    assert caught, f"caught by nothing that has a name: {first}"
    assert bool(near) == mistake.guard
    record_property("rule", mistake.rule)
    record_property("wrong version", mistake.name)
    record_property("caught by", f"near miss, {caught[0]}" if near else caught[0])


def _split(complaint):
    """The fact that a near miss changed, and the first line of what is wrong then."""
    first, *others = complaint.splitlines()
    return (first, others[0]) if first.startswith("near miss") else ("", first)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.rule}: {m.name}")
def test_a_wrong_version_is_another_one_while_it_lasts_and_no_longer(mistake):
    assert all(mistake.source.count(right) == 1 for right, _ in mistake.changes)
    before = codes(mistake.path)
    with made(mistake) as changed:
        assert 1 <= changed <= len(mistake.changes)
    assert codes(mistake.path) == before


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.rule}: {m.name}")
def test_the_right_rule_passes_on_the_same_models(mistake):
    """It fires there, or declines on all of them where the models themselves show what a guard is for."""
    hold = near_misses if mistake.guard else check_rule
    try:
        hold(mistake.given or rule_of(mistake.rule), mistake.models(), settings=settings(FEW, max_examples=5))
    except AssertionError as complaint:
        assert "fired on none of the drawn models" in str(complaint) and not mistake.guard


def test_every_shipped_rule_has_two_wrong_versions():
    found = Counter(mistake.rule for mistake in MISTAKES)
    assert found.keys() == rule_offers().keys()
    assert min(found.values()) >= 2
    assert len({(m.rule, m.name) for m in MISTAKES}) == len(MISTAKES)

"""``near_misses``: where one fact is other than in a model on which the rule fires, it fires rightly or declines."""

from __future__ import annotations

import contextlib

import onnx_ir as ir
from hypothesis import given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from rewriter.parity.runtime import Runtime
from rewriter.testing.change.mutations import RefusedError, copy_model, places, require_runnable
from rewriter.testing.check import check_drawn, describe, run
from rewriter.testing.drawing import Seen, terse
from rewriter.testing.strategies import any_models
from rewriter.testing.usage import RuleUnderTest, as_model, name_of, require_models, require_rule

_TRIES = 5
"""Changes that are drawn until one gives a model that runs."""


def near_misses(
    rule: RuleUnderTest,
    models: st.SearchStrategy[ir.Model] | None = None,
    *,
    judge: Runtime | None = None,
    settings: hypothesis_settings | None = None,
) -> None:
    """Holds a rule to its promises on models that differ in one fact from one on which it fires.

    A fact is what an attribute says, which input is which, a number in a constant, who else reads a value, whether a
    caller may override a constant, and so on. A changed model that the checker or the runtime refuses is left out.

    Args:
        rule: as for :func:`check_rule`.
        models: draws the models that are changed; by default those of :func:`any_models`.
        judge: as for :func:`check_rule`; whether a changed model runs is asked of ONNX Runtime as it runs by default.
        settings: of Hypothesis; by default those of the present profile.

    Raises:
        AssertionError: a promise is broken, or the rule fired on none of the models; the message holds the changed
            fact, then what :func:`check_rule` would say of the changed model.
        UsageError: ``models`` is no strategy, or draws no models.
        RuleSetError: there is no such rule.
    """
    __tracebackhide__ = True
    require_rule(rule)
    require_models(models)
    seen = Seen(name_of(rule))
    refusals: list[str] = []
    held = False

    def holds(model: ir.Model, data: st.DataObject) -> None:
        __tracebackhide__ = True
        nonlocal held
        model = as_model(model)
        if not _fires(rule, model, judge, seen):
            reject()
        try:
            near, kind, what = _near(model, data)
        except RefusedError as refused:
            refusals.append(str(refused))
            reject()
        held = True
        try:
            report = check_drawn(rule, near, judge)
        except AssertionError as broken:
            raise AssertionError(f"near miss: {what}\n{broken}") from broken.__cause__
        seen.note(report, f"{kind}: ")

    drawn = given(any_models() if models is None else models, st.data())(holds)
    drawn.__name__ = f"near_misses_{name_of(rule)}"  # Hypothesis keeps failing examples by name
    with contextlib.suppress(Unsatisfiable):
        terse(settings or hypothesis_settings())(drawn)()
    seen.require_fired()
    if not held:
        raise AssertionError(
            f"{name_of(rule)}: the runtime refuses every model that is near one on which it fires; the last,"
            f" {refusals[-1]}"
        )


def _fires(rule: RuleUnderTest, model: ir.Model, judge: Runtime | None, seen: Seen) -> bool:
    __tracebackhide__ = True
    try:
        report = run(rule, model, judge).report
    except AssertionError as broken:
        raise AssertionError(f"{name_of(rule)}: {broken}\n\n{describe(model)}") from broken.__cause__
    seen.add(report)
    return bool(report.applied)


def _near(model: ir.Model, data: st.DataObject) -> tuple[ir.Model, str, str]:
    """Returns a model with one fact changed, the mutation and the change.

    Raises:
        RefusedError: none that was drawn runs; of the last.
    """
    reason = ""
    for _ in range(_TRIES):
        changed = copy_model(model)
        there = places(changed)
        kind = data.draw(st.sampled_from(list(there)), "mutation")
        place = data.draw(st.sampled_from(there[kind]), "place")
        place.change()
        try:
            return require_runnable(changed, model), kind, place.what
        except RefusedError as refused:
            reason = f"{place.what}: {' '.join(str(refused).split())}"
    raise RefusedError(reason)

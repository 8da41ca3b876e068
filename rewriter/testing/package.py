"""``package_tests``: every rule and rule set of a package, held to its promises by one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import onnx_ir as ir
from hypothesis import settings as hypothesis_settings
from hypothesis.strategies import SearchStrategy

from rewriter.errors import UsageError, nearest
from rewriter.parity.runtime import Runtime
from rewriter.ruleset import load
from rewriter.ruleset.catalogue import SECTIONS, bind, describe
from rewriter.ruleset.discover import GROUP, RuleOffer, rule_offers, set_offers
from rewriter.ruleset.source import Source
from rewriter.testing.check import check_rule
from rewriter.testing.drawing import NeverFiredError
from rewriter.testing.near_misses import near_misses
from rewriter.testing.usage import require_models

Models = Mapping[str, SearchStrategy[ir.Model]]

_WRITE = """\
Write a strategy that draws models on which it fires, and name it in the line that tests the package:

import onnx_ir as ir
from hypothesis import strategies as st

@st.composite
def models(draw):
    number = draw(st.sampled_from(["1", "8"]))
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>'
        f"g (float[T, 2] x) => (float[T, 2] y) <float c = {{{{{{number}}}}}}> {{{{ y = Div(x, c) }}}}"
    )

test_rules = package_tests("{}", models={{"{}": models()}})"""


def package_tests(
    package: str,
    models: Models | None = None,
    *,
    without: Collection[str] = (),
    plan: Mapping[str, Any] | None = None,
    judge: Runtime | None = None,
    settings: hypothesis_settings | None = None,
) -> Callable[..., None]:
    """Returns a pytest test of everything that a package offers: assign it to a name that begins with ``test_``.

    Of each rule: its module's docstring has every section of a rule's page; it is built from its defaults, and each
    option is described; :func:`check_rule`; :func:`near_misses`. Of each shipped rule set: it loads.

    Args:
        package: its import name, as the entry point group ``rewriter.rules`` has it.
        models: rule -> what draws its models; for the others, :func:`any_models`.
        without: tests to leave out, as pytest shows their ids: ``my-rule-near_misses``.
        plan: under which the rules are tested, as ``quantization`` of a rule set: ``{"default": {"bits": 8}}``; by
            default 4 bits in blocks of 32, symmetric.
        judge: as for :func:`check_rule`.
        settings: of Hypothesis; by default those of the present profile.

    Raises:
        UsageError: no such package is installed, a key of ``models`` is no rule of it, or there is no test that
            is to be left out.
        RuleSetError: a package cannot be imported, or two offer the same id.
    """
    import pytest  # noqa: PLC0415 -- all else here runs without it

    offers, sets = rule_offers(), set_offers()
    rules = {name: offer for name, offer in offers.items() if offer.package == package}
    shipped = [name for name, offer in sets.items() if offer.package == package]
    if not rules and not shipped:
        others = {offer.package for offer in offers.values()} | {offer.package for offer in sets.values()}
        wanted = "it wants the import name of an installed package that has one"
        raise UsageError(
            f"no entry point of group {GROUP} names a package '{package}'{nearest(package, others)}; {wanted}"
        )
    for name in models or {}:
        if name not in rules:
            raise UsageError(f"models of '{name}', which is no rule of package '{package}'{nearest(name, rules)}")
        require_models((models or {})[name], f"models['{name}']")
    promises = [
        case
        for offer in rules.values()
        for case in _of_rule(offer, (models or {}).get(offer.name), plan, {"judge": judge, "settings": settings})
    ]
    promises += [(f"{name}-loads", functools.partial(load, name)) for name in shipped]
    for name in without:
        if name not in dict(promises):
            raise UsageError(f"there is no test '{name}' to leave out{nearest(name, dict(promises))}")
    kept = [pytest.param(holds, id=name) for name, holds in promises if name not in without]

    @pytest.mark.parametrize("promise", kept)
    def test(promise: Callable[[], object]) -> None:
        __tracebackhide__ = True
        promise()

    return test


def _of_rule(
    offer: RuleOffer,
    models: SearchStrategy[ir.Model] | None,
    plan: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield f"{offer.name}-page", functools.partial(_check_page, offer)
    yield f"{offer.name}-options", functools.partial(_check_options, offer)
    for holds in (check_rule, near_misses):
        yield f"{offer.name}-{holds.__name__}", functools.partial(_hold, holds, offer, models, plan, options)


def _hold(
    holds: Callable[..., None],
    offer: RuleOffer,
    models: SearchStrategy[ir.Model] | None,
    plan: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> None:
    __tracebackhide__ = True
    under = {"phases": [{"name": "tested", "rules": [offer.name]}], "quantization": plan}
    try:
        holds(offer.name if plan is None else under, models, **options)
    except NeverFiredError as never:
        raise NeverFiredError(f"{never}\n\n{_WRITE.format(offer.package, offer.name)}") from None


def _check_page(offer: RuleOffer) -> None:
    sections = describe(offer).sections
    missing = [f"'{title}:'" for title in SECTIONS if not sections.get(title)]
    assert not missing, f"the docstring of {offer.module} has no section {', '.join(missing)}"


def _check_options(offer: RuleOffer) -> None:
    info = describe(offer)
    for option in info.options:
        assert option.description, f"option '{option.name}' of rule {offer.name} has no line in the Args of 'rule'"
    defaults = {option.name: option.default for option in info.options}
    for made in bind(info, defaults, Source(f"the defaults of rule {offer.name}", None, None), ()).rules:
        assert made.name == offer.name, f"rule {offer.name} calls itself '{made.name}': one name in YAML and in reports"

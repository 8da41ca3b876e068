"""``check_rule``: whatever graph is drawn, the rule fires with parity or declines with a reason."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis.strategies import SearchStrategy

from rewriter.api import apply
from rewriter.engine import purity
from rewriter.errors import ParityError, RewriterError, RuleError
from rewriter.parity.local import LocalProver
from rewriter.parity.runtime import Runtime
from rewriter.report import Report
from rewriter.report.provenance import KEY
from rewriter.result import Result
from rewriter.ruleset import load
from rewriter.testing.drawing import Seen, terse
from rewriter.testing.promises.agreement import check_outputs
from rewriter.testing.promises.leftovers import check_leftovers
from rewriter.testing.promises.runs import check_runs
from rewriter.testing.promises.sizes import check_sizes
from rewriter.testing.promises.valid import check_valid
from rewriter.testing.strategies import any_models
from rewriter.testing.usage import RuleUnderTest, as_model, as_rules, name_of, require_models, require_rule

_MORE = 5
"""How many times as many models are drawn until a rule fires, where it fired on none of the first."""

_UNMATCHED = "is not among the constants of what its rule matched"
"""How the local proof declines where a rule should have."""


def check_rule(
    rule: RuleUnderTest,
    models: SearchStrategy[ir.Model] | None = None,
    *,
    judge: Runtime | None = None,
    settings: hypothesis_settings | None = None,
) -> None:
    """Holds a rule to its promises on every model that a strategy draws; see :func:`check_model`.

    Args:
        rule: a rule (an id, a class or an instance), or a list of rules, a parsed rule set or a ``RuleSet``.
        models: draws the models; by default those of :func:`any_models`.
        judge: runs the models and the proofs; by default ONNX Runtime on the CPU, with its optimizations. Those fuse
            some forms into kernels that round more, as ``DequantizeLinear`` before a ``MatMul``:
            ``OrtRuntime(optimize=False)`` runs what the model says.
        settings: of Hypothesis; by default those of the present profile.

    Raises:
        AssertionError: a promise is broken, or the rule fired on none of the models; the message holds the smallest
            such model as ONNX text, ready for :func:`check_model` in a regression test.
        UsageError: ``models`` is no strategy, or draws no models.
        RuleSetError: there is no such rule.
    """
    __tracebackhide__ = True
    require_rule(rule)
    require_models(models)
    profile = settings or hypothesis_settings()
    seen = Seen(name_of(rule))

    def holds(model: ir.Model) -> None:
        __tracebackhide__ = True
        seen.add(check_drawn(rule, model, judge))

    def seeks(model: ir.Model) -> None:
        __tracebackhide__ = True
        if not seen.fired:
            holds(model)

    for test, examples in ((holds, profile.max_examples), (seeks, _MORE * profile.max_examples)):
        drawn = given(any_models() if models is None else models)(test)
        drawn.__name__ = f"check_rule_{name_of(rule)}"  # Hypothesis keeps failing examples by name
        if not seen.fired:
            terse(hypothesis_settings(profile, max_examples=examples))(drawn)()
    seen.require_fired()


def check_model(rule: RuleUnderTest, model: ir.Model | str, *, judge: Runtime | None = None) -> Report:
    """Holds a rule to its promises on one model.

    It raises nothing; each decline has a reason; the result is valid, loads and computes what the model computes (with
    its dequantized weights, where weights were quantized); it gives the same bytes each time; on the result it fires no
    more; the given model, and of the result everything that the rule is not about, is as it was.

    Args:
        rule: as for :func:`check_rule`.
        model: a model, or its ONNX text.
        judge: as for :func:`check_rule`.

    Returns:
        The report of the run.

    Raises:
        AssertionError: a promise is broken; the message holds the model as ONNX text.
        UsageError: ``model`` is neither a model nor its text.
        RuleSetError: there is no such rule.
    """
    __tracebackhide__ = True
    require_rule(rule)
    return check_drawn(rule, model, judge)


def check_drawn(rule: RuleUnderTest, model: ir.Model | str, judge: Runtime | None) -> Report:
    """Does as :func:`check_model` with a rule that is known to be one."""
    __tracebackhide__ = True
    given_model = as_model(model)
    before = _bytes(given_model)
    try:
        return _check(rule, given_model, before, judge)
    except AssertionError as broken:
        raise AssertionError(f"{name_of(rule)}: {broken}\n\n{describe(given_model)}") from broken.__cause__


def describe(model: ir.Model) -> str:
    """Returns the model as ONNX text, with its weights: what :func:`check_model` takes in a regression test."""
    proto = ir.to_proto(model)
    for body in _bodies(proto):
        held = {tensor.name for tensor in getattr(body, "initializer", ())}  # the text shows type and value of these
        others = [value for value in body.value_info if value.name not in held]
        del body.value_info[:]
        body.value_info.extend(others)
    return onnx.printer.to_text(proto)


def run(rule: RuleUnderTest, model: ir.Model, judge: Runtime | None, what: str = "it") -> Result[ir.Model]:
    """Applies the rule and proves every rewrite.

    Raises:
        AssertionError: it fails or raises; the message says so of ``what``.
    """
    try:
        with purity.checked():
            rules = load(as_rules(rule), overrides={"parity.local": "all"})
            return apply(model, rules, prover=LocalProver(rules.parity, judge), strict=True)
    except ParityError as error:
        raise AssertionError(f"{what} failed its parity: {error}") from None
    except RuleError as error:
        raise AssertionError(f"{what} raised RuleError: {error}") from error.__cause__
    except RewriterError as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from None
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}, which is no RewriterError: {error}") from error


def _check(rule: RuleUnderTest, model: ir.Model, before: bytes, judge: Runtime | None) -> Report:
    __tracebackhide__ = True
    result = run(rule, model, judge)
    assert _bytes(model) == before, "the given model has changed"
    report = result.report
    for decline in report.declines:
        assert decline.reason, f"rule {decline.rule} declined at {decline.node} without a reason"
        assert _UNMATCHED not in decline.reason, (
            f"rule {decline.rule} at {decline.node} quantizes what it did not match, and only the proof declines:"
            f" {decline.reason}"
        )
    after = _bytes(result.model)
    assert _bytes(run(rule, model, judge, "a second run").model) == after, "a second run gives another model"
    if not report.applications:
        changed = _difference(_graph(before), _graph(after))
        assert not changed, f"nothing fired, yet the result is another model:\n{changed}"
        return report
    _check_rest(model, result.model)
    check_valid(before, after)
    try:
        check_sizes(model, result.model)
        check_leftovers(model, result.model)
        check_runs(model, result.model, report.target)
        check_outputs(model, result.model, judge)
    except AssertionError as wrong:
        raise AssertionError(f"{wrong}\n\nafter:\n{describe(result.model)}\nbefore:") from None
    again = run(rule, result.model, judge, "a run on the result").report.applied
    assert not again, f"on its own result it fires again: {again}"
    return result.report


def _check_rest(before: ir.Model, after: ir.Model) -> None:
    """Asserts that inputs, outputs, metadata and the constants that are left are as they were."""
    for what in ("inputs", "outputs"):
        old, new = ([_signature(v) for v in getattr(m.graph, what)] for m in (before, after))
        assert old == new, f"the graph's {what} were {old} and are {new}"
    kept, left = (
        ({k: v for k, v in m.metadata_props.items() if k != KEY}, m.graph.metadata_props, m.producer_name, m.doc_string)
        for m in (before, after)
    )
    assert kept == left, "the model's metadata has changed"  # but for what a run notes of itself
    constants: Mapping[str, ir.Value] = before.graph.initializers
    for name, value in after.graph.initializers.items():
        if name in constants and value.const_value is not constants[name].const_value:
            raise AssertionError(f"initializer '{name}' is another tensor now")


def _signature(value: ir.Value) -> str:
    return f"{value.name}: {value.type} {value.shape}"


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _graph(model: bytes) -> onnx.ModelProto:
    """The model without the types of its values, which a run may find and note."""
    proto = onnx.load_from_string(model)
    for body in _bodies(proto):
        del body.value_info[:]
    return proto


def _bodies(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    for body in (model.graph, *model.functions):
        yield from _with_inner(body)


def _with_inner(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    yield body
    for node in body.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _with_inner(attribute.g)


def _difference(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    lines = difflib.unified_diff(str(before).splitlines(), str(after).splitlines(), "before", "after", n=2, lineterm="")
    return "\n".join(itertools.islice(lines, 30))

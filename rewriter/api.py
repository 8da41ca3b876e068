"""``rewriter.apply``: one call from a model to its rewritten form, its report, and ``save``."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

import onnx
import onnx_ir as ir

from rewriter import io
from rewriter.calibration import Calibration
from rewriter.engine.context import ModelRun
from rewriter.engine.driver import Engine, Prover, Watch, without_cycle_collection
from rewriter.errors import RuleSetError, UsageError
from rewriter.graph.contents import Slot, all_nodes, subgraphs
from rewriter.inspection.left import left_in_float
from rewriter.inspection.weights import bytes_by_family, sizes
from rewriter.io.identity import of_inputs, of_rules
from rewriter.io.validate import validate
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.qmoe import QMOE
from rewriter.parity import apart
from rewriter.parity.judge import unfit
from rewriter.parity.local import LocalProver
from rewriter.parity.written import require_sources
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.importance import Importance
from rewriter.quantize.lossless import OffGridError
from rewriter.quantize.plan import CUSTOM, QuantizationPlan
from rewriter.quantize.types import FloatArray, Quantizer
from rewriter.report import Made, Misfit, Report
from rewriter.report.provenance import made_by, note, provenance
from rewriter.result import Result
from rewriter.roles import ROLES
from rewriter.ruleset import RuleSet, RuleSetLike, load, used
from rewriter.target import Target

DEFAULT_RULES = "moe-int4"

QUANTIZED_OPERATORS = frozenset(
    {*(o.name for o in (QMOE, MATMUL_NBITS, GATHER_BLOCK_QUANTIZED)), "DequantizeLinear", "MatMulBnb4"}
)


class Options(TypedDict, total=False):
    """The options of :func:`apply`, for its types."""

    quantizer: Quantizer | None
    imatrix: str | os.PathLike[str] | Mapping[str, FloatArray] | None
    calibration: str | os.PathLike[str] | Calibration | None
    target: str | None
    overrides: Mapping[str, Any] | None
    prover: Prover | None
    progress: Callable[[str, int], None] | None
    watch: Watch | None
    strict: bool


@overload
def apply(model: onnx.ModelProto, rules: RuleSetLike = ..., **options: Unpack[Options]) -> Result[onnx.ModelProto]: ...


@overload
def apply(
    model: str | os.PathLike[str] | ir.Model | io.Exported, rules: RuleSetLike = ..., **options: Unpack[Options]
) -> Result[ir.Model]: ...


@overload
def apply(model: io.Model, rules: RuleSetLike = ..., **options: Unpack[Options]) -> Result[Any]: ...


def apply(
    model: io.Model,
    rules: RuleSetLike = DEFAULT_RULES,
    *,
    quantizer: Quantizer | None = None,
    imatrix: str | os.PathLike[str] | Mapping[str, FloatArray] | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    target: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    prover: Prover | None = None,
    progress: Callable[[str, int], None] | None = None,
    watch: Watch | None = None,
    strict: bool = False,
) -> Result[Any]:
    """Rewrites a model by a rule set; the given model is left as it is.

    Args:
        model: a path, an ``onnx_ir.Model``, an ``onnx.ModelProto``, or what ``torch.onnx.export`` returns.
        rules: a shipped rule set's name, a YAML file, a parsed one, or a list of onnxscript rules.
        quantizer: quantizes every weight that the plan says to quantize, in place of the built-in algorithms.
        imatrix: mean squared activations that weigh the error, by weight [K] or stack [E, K]; or a file of them:
            an ``.npz``, or the ``.gguf`` or ``.dat`` of llama.cpp.
        calibration: what the weights saw on real inputs, or the folder that ``calibrate`` wrote; ``gptq`` and a
            quantizer of one's own go by it.
        target: runtime to rewrite for, ``PROVIDER[:ARCHITECTURE][@VERSION]``; by default the rule set's.
        overrides: values of the rule set by dotted key, as ``{"quantization.default.bits": 8}``.
        prover: proves each rewrite before it is committed; by default as the rule set's ``parity`` says.
        progress: told the phase and the number of rewrites so far.
        watch: told of every rule that was tried and did not fire.
        strict: a rewrite that fails its proof raises ProofError; else it is left out, and ``report.declines`` says so.

    Raises:
        RuleSetError: the rule set is wrong, or a name in it matches nothing in the model.
        ModelError: the model is unreadable or invalid.
        UsageError: an argument is none of those above.
        RewriterError: see ``rewriter.errors`` for the others.
    """
    rule_set = load(rules, overrides=overrides)
    if rule_set.parity.local != "none" and prover is None:
        apart.start()
    runtime = Target.parse(rule_set.target if target is None else target)
    importance = Importance.given(imatrix)
    seen_inputs = Calibration.open(calibration) if isinstance(calibration, str | os.PathLike) else calibration
    quantizers = {CUSTOM: _missing, **ALGORITHMS} if quantizer is None else _every(quantizer)

    others = {"imatrix": imatrix, "calibration": calibration, "quantizer": quantizer}
    given = tuple(name for name, value in others.items() if value is not None)

    @without_cycle_collection()
    def attempt(*, looks_whole: bool) -> Result[Any]:
        ours = io.own_copy(model)
        source = io.source_path(ours) if quantizer is None and isinstance(model, str | os.PathLike) else None
        inputs = None if source is None else of_inputs(source, imatrix, seen_inputs.manifest if seen_inputs else None)
        seen = _names(ours) if rule_set.plan.asks_for_names else []
        plan = rule_set.plan.named(seen)
        run = ModelRun(
            ours,
            plan,
            runtime,
            quantizers,
            importance,
            seen_inputs,
            rounded_activations=rule_set.rounded_activations,
            accuracy_level=rule_set.accuracy_level,
            looks_whole=looks_whole,
        )
        engine = Engine(run, prover or LocalProver(rule_set.parity), progress, watch, strict=strict)
        return _rewritten(model, rule_set, run, engine, plan, seen, given, inputs, lambda: attempt(looks_whole=True))

    try:
        return attempt(looks_whole=False)
    except OffGridError:
        return attempt(looks_whole=True)


def _rewritten(
    model: io.Model,
    rule_set: RuleSet,
    run: ModelRun,
    engine: Engine,
    plan: QuantizationPlan,
    seen: Sequence[tuple[str, str]],
    given: tuple[str, ...],
    inputs: Mapping[str, str] | None,
    again: Callable[[], Result[Any]],
) -> Result[Any]:
    ours = run.model
    name = ours.graph.name or ""
    files = io.bytes_on_disk(io.source_path(ours), io.files_read(ours))
    nodes = list(all_nodes(ours))
    quantized = [node for node in nodes if node.op_type in QUANTIZED_OPERATORS]
    before = bytes_by_family(ours, run.role)
    outcome = engine.apply(rule_set)
    _require_names(plan, [*seen, *run.readers], {*ROLES, *run.roles})
    run.importance.require_used(weight for _, weight in run.readers)
    validate(ours)
    still = set(all_nodes(ours))
    use = run.plan_use()
    kept = Counter(node.op_type for node in quantized if node in still)
    rules, earlier = used(rule_set, use), made_by(ours.metadata_props)
    made = Made.by(rules, str(run.target), given)
    if outcome.applications:
        note(ours.metadata_props, made)
    circumstances = provenance(made, earlier)

    @without_cycle_collection()
    def report() -> Report:
        after = bytes_by_family(ours, run.role)
        return Report(
            rule_set=rule_set.name,
            target=str(run.target),
            applications=tuple(outcome.applications),
            declines=tuple(outcome.declines),
            proofs=tuple(outcome.proofs),
            weights=run.weights,
            left=left_in_float(ours, outcome.declines, run.role, rule_set, _default(rule_set)),
            sweeps=outcome.sweeps,
            files_before=files,
            bytes_before=sum(before.values()),
            bytes_after=sum(after.values()),
            model=os.fspath(model) if isinstance(model, str | os.PathLike) else name,
            rules=rules,
            sizes=sizes(before, after),
            misfits=tuple(Misfit(node.name or "", why) for node, why in unfit(all_nodes(ours), run.target)),
            already_quantized=dict(sorted(kept.items())),
            provenance=circumstances,
        )

    def inspect(given: Sequence[Slot], written: ir.Model) -> None:
        require_sources(given, written, run.recorded)

    # What was made ready for rules, as functions that were inlined, stays only where one fired.
    written = ours if outcome.applications else io.as_model(model)
    identity = None if inputs is None else {**inputs, **of_rules(made, whole=run.looks_whole)}
    return Result(written, rule_set, report, inspect, model, again, identity, nodes_before=len(nodes))


def _default(present: RuleSet) -> RuleSet:
    """The default rule set; the present one where no shipped ones are installed, as in tests of a package alone."""
    try:
        return _shipped()
    except RuleSetError:
        return present


@functools.cache
def _shipped() -> RuleSet:
    return load(DEFAULT_RULES)


def _names(model: ir.Model) -> list[tuple[str, str]]:
    """Every node name and every initializer name, as the plan's globs may mean them."""
    nodes = list(all_nodes(model))
    graphs = [model.graph, *(graph for node in nodes for graph in subgraphs(node))]
    found = [(node.name or "", "") for node in nodes]
    return found + [("", name) for graph in graphs for name in graph.initializers]


def _require_names(plan: QuantizationPlan, seen: Sequence[tuple[str, str]], roles: Collection[str]) -> None:
    unmatched = plan.unmatched(seen, roles)
    if unmatched:
        raise RuleSetError(str(unmatched[0]))


def _every(quantizer: Quantizer) -> dict[str, Quantizer]:
    if not callable(quantizer):
        what = type(quantizer).__name__
        raise UsageError(f"a quantizer is a function of weight and context, as rewriter.Quantizer says, not {what}")
    return dict.fromkeys((CUSTOM, *ALGORITHMS), quantizer)


def _missing(*_: Any) -> Any:
    raise UsageError("algorithm 'custom' needs a function: rewriter.apply(model, quantizer=f)")

"""Rewrites a model before it is run for a calibration, so that one sees what goes to each expert.

Blocks that the provider runs as one MoE node become that: it runs faster, and its inputs are the tokens and the
router's logits. A block that would fuse but for the provider's kernels runs as it is. A second copy of the model, in
which it is fused all the same, tells which values its tokens and logits are; what computes the logits is added to the
model that runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir

from rewriter.calibration.finding import find_sites
from rewriter.calibration.sites import ExpertSite, Sites
from rewriter.engine.context import ModelRun
from rewriter.engine.driver import Engine
from rewriter.operators.activation import ACTIVATIONS
from rewriter.operators.moe import MOE
from rewriter.operators.qmoe import QMOE
from rewriter.parity.local import LocalProver
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.plan import CUSTOM
from rewriter.ruleset import load
from rewriter.target import Target
from rewriter.target.experts import Kernel

_FUSE = {"name": "fuse", "rules": ["fuse-experts"]}
_RUNNABLE = {
    "phases": [
        _FUSE,
        {"name": "normalise", "rules": ["swiglu-interleave", "moe-fuse-fc3"]},
        {"name": "unbatch", "rules": ["einsum-to-matmul", "unbatch"]},
    ]
}
"""What brings experts into forms that a provider runs, and that are looked at."""
_KNOWABLE = {
    "phases": [_FUSE, {"name": "fuse-rounded", "rules": [{"fuse-experts": {"into": QMOE.name}}]}],
    "quantization": {"default": {"block_size": 0}},
}
"""What makes experts known. A second phase takes those whose factors would round half weights."""

_BLOCKS = dict.fromkeys((2, 4, 8), (0, 16, 32, 64, 128, 256))


class _Anything(Target):
    """A target that would run all experts."""

    def kernels(self, operator: str) -> tuple[Kernel, ...]:
        return (
            Kernel(
                (0, 0),
                dtypes=("FLOAT", "FLOAT16", "BFLOAT16"),
                activations=tuple(activation.name for activation in ACTIVATIONS),
                fusions=(1, 2),
                fc3=("silu", "swiglu"),
                sparse_mixer=True,
                router_weights=(False, True),
                blocks=_BLOCKS,
            ),
        )


def prepare(model: ir.Model, provider: str) -> Sites:
    """Brings a model, which is edited, into the form in which it is run, and finds where to look.

    Args:
        model: the model.
        provider: what will run it.
    """
    target = Target.parse("auto" if provider == "cpu" else provider)
    run = _rewritten(model, _RUNNABLE, target)
    sites = find_sites(run)
    if any(node.op_type == "TopK" for node in model.graph):
        more = tuple(_grafted(model, target))
        covered = {part for site in more for parts in site.parts(site.fc1, site.fc2, site.fc3) for part in parts}
        sites = sites.without(covered)
        sites = replace(sites, experts=(*sites.experts, *more))
    return sites


def _rewritten(model: ir.Model, rules: Mapping[str, object], target: Target) -> ModelRun:
    """Rewrites a model, each class of rewrites proved as always; what the run knows at its end is what is constant."""
    rule_set = load(rules)
    run = ModelRun(
        model,
        rule_set.plan,
        target,
        {CUSTOM: ALGORITHMS["rtn"], **ALGORITHMS},
        rounded_activations=rule_set.rounded_activations,
    )
    Engine(run, LocalProver(rule_set.parity)).apply(rule_set)
    run.recognise(())
    return run


def _grafted(model: ir.Model, target: Target) -> Iterator[ExpertSite]:
    """Yields the blocks of a model that fuse on another target only; what computes their logits is added to it."""
    other = model.clone()
    known = dict(zip(_values(other), _values(model), strict=True))
    before = set(other.graph)
    anything = _Anything(target.provider, target.architecture, target.version, target.installed)
    run = _rewritten(other, _KNOWABLE, anything)
    for node in other.graph:
        if node not in before and MOE.computes(node) and (site := find_sites(run, [node]).experts):
            x, logits = (_copied(value, known, model) for value in (site[0].x, site[0].logits))
            yield replace(site[0], x=x, logits=logits, y=None)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _copied(value: ir.Value, known: dict[ir.Value, ir.Value], model: ir.Model) -> ir.Value:
    """Returns the value of ``model`` for one of its rewritten copy; nodes that are new there are added."""
    if value not in known:
        producer = value.producer()
        if producer is None:
            made = ir.Value(name=f"calibration.{len(known)}", const_value=value.const_value)
            model.graph.initializers.add(made)
            known[value] = made
        else:
            inputs = [None if v is None else _copied(v, known, model) for v in producer.inputs]
            outputs = [
                ir.Value(name=f"calibration.{len(known)}.{i}", type=v.type) for i, v in enumerate(producer.outputs)
            ]
            attributes = list(producer.attributes.values())
            model.graph.append(ir.Node(producer.domain, producer.op_type, inputs, attributes, outputs=outputs))
            known |= dict(zip(producer.outputs, outputs, strict=True))
    return known[value]

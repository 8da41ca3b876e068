"""Times the fixpoint engine against onnxscript's own single sweep, on the same model and with the same rules.

    python benchmarks/engine.py [--layers 30] [--experts 128] [--runs 3]

Both apply one rule written in plain onnxscript: Gather -> Squeeze -> Transpose of a stack becomes an initializer.
Seconds are of processor time, for all without Python's cycle collector, which the engine pauses; a sweep that finds
nothing more to do is timed by itself too.
A second table shows that the shipped rule sets take time linear in the number of experts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import models
import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet

import rewriter
from rewriter.engine.context import ModelRun
from rewriter.engine.driver import Engine, without_cycle_collection
from rewriter.ruleset import load
from rewriter.target import Target


class FoldSlice(RewriteRuleClassBase):
    """Gather(stack, [e]) -> Squeeze -> Transpose, as one lazy initializer; onnxscript's own style."""

    def pattern(self, op: Any, stack: Any, index: Any, axes: Any) -> Any:
        return op.Transpose(op.Squeeze(op.Gather(stack, index), axes), _outputs=["out"])

    def check(self, context: Any, stack: ir.Value, index: ir.Value, **_: Any) -> bool:
        return stack.const_value is not None and index.const_value is not None

    def rewrite(self, op: Any, stack: ir.Value, index: ir.Value, out: ir.Value, **_: Any) -> Any:
        source, expert = stack.const_value, int(index.const_value.numpy().item())
        _, rows, columns = source.shape.numpy()
        lazy = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(source.numpy()[expert].T)),
            dtype=source.dtype,
            shape=ir.Shape((columns, rows)),
        )
        return op.Identity(op.initializer(lazy, name=f"{stack.name}_{expert}"))


def onnxscript_sweep(model: ir.Model) -> int:
    return RewriteRuleSet([FoldSlice.rule()]).apply_to_model(model)


def prepared(model: ir.Model) -> Engine:
    """An engine that has looked at the model: the roles of its weights are for quantizing rules, not for this one."""
    return Engine(ModelRun(model, load([FoldSlice()]).plan, Target(), {}), lambda rewrite, run: None)


def our_fixpoint(engine: Engine) -> int:
    return len(engine.apply(load([FoldSlice()])).applications)


def whole_apply(model: ir.Model) -> int:
    return sum(rewriter.apply(model, [FoldSlice()]).report.applied.values())


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    start = time.process_time()
    with without_cycle_collection():
        result = function(*arguments)
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    model = models.unrolled_model(options.layers, options.experts)
    size = f"{options.layers} layers x {options.experts} experts, {model.graph.num_nodes()} nodes"
    print(f"{size}, best of {options.runs} runs\n")
    print("| driver | seconds | rewrites |\n|---|---|---|")
    times = {}
    drivers = {
        "onnxscript, one sweep": onnxscript_sweep,
        "this engine, to the fixpoint": our_fixpoint,  # of an engine that `prepared` has made
        "`rewriter.apply`: copy, roles, proof, validation too": whole_apply,
    }
    for name, function in drivers.items():
        prepare = prepared if function is our_fixpoint else ir.Model.clone
        runs = [timed(function, prepare(model.clone())) for _ in range(options.runs)]
        times[name] = min(seconds for seconds, _ in runs)
        print(f"| {name} | {times[name]:.2f} | {runs[0][1]} |")
    first, second, _ = times.values()
    print(f"\nratio of the first two: {second / first:.2f}")
    done = prepared(model.clone())
    our_fixpoint(done)
    print(f"a sweep that finds nothing: {min(timed(our_fixpoint, done)[0] for _ in range(options.runs)):.3f} s\n")
    print("| experts | nodes | `unstack` s | `experts-int4` s |\n|---|---|---|---|")
    for experts in (options.experts // 4, options.experts // 2, options.experts):
        part = models.unrolled_model(options.layers, experts)
        row = [timed(rewriter.apply, part, rules)[0] for rules in ("unstack", "experts-int4")]
        print(f"| {experts} | {part.graph.num_nodes()} | {row[0]:.2f} | {row[1]:.2f} |")


if __name__ == "__main__":
    main()

"""The installed ONNX Runtime computes what the operators' definitions say, if it is the target."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.graph.contents import all_nodes
from rewriter.parity.judge import cannot_run
from rewriter.parity.local import default_runtime
from rewriter.target import Target


def check_runs(before: ir.Model, after: ir.Model, target: str) -> None:
    """Holds a result for the runtime at hand to what that runs; the proofs ask what operators mean, not who runs them.

    Raises:
        AssertionError: the runtime does not run an operator of the result, or runs it as something else, and does not
            do so with that operator in the model.
    """
    if target != str(Target.parse("auto")):
        return
    provider = default_runtime().name
    refused = {node.op_type for node in all_nodes(before) if cannot_run([node], provider)}
    reason = cannot_run((node for node in all_nodes(after) if node.op_type not in refused), provider)
    assert not reason, f"{target} runs the model's operators and not the result's: {reason}"

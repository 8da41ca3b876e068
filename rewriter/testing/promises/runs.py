"""Whether the runtime at hand runs a rewritten model as its operators are meant, where it is rewritten for it."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.parity.judge import cannot_run
from rewriter.parity.local import default_runtime
from rewriter.stored import all_nodes
from rewriter.target import Target


def check_runs(before: ir.Model, after: ir.Model, target: str) -> None:
    """Holds a result for the runtime at hand to what that runs; the proofs ask what operators mean, not who runs them.

    Raises:
        AssertionError: the runtime runs the model, and the result not at all, or as something else.
    """
    if target != str(Target.parse("auto")):
        return
    provider = default_runtime().name
    reason = cannot_run(all_nodes(after), provider)
    assert not reason or cannot_run(all_nodes(before), provider), (
        f"{target} runs the model and not the result: {reason}"
    )

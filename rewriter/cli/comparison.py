"""Comparing a rewritten model with the original after ``apply``: whether it is done, and what counts as a failure."""

from __future__ import annotations

import dataclasses
from typing import Any

from rewriter.api import QUANTIZED_OPERATORS
from rewriter.errors import ParityError, TargetError, UsageError
from rewriter.graph.contents import all_nodes, is_random, name_of
from rewriter.parity.expected import expected_l2
from rewriter.parity.limits import exceeded, limited
from rewriter.parity.model import OriginalError
from rewriter.parity.runtime import missing, runtime
from rewriter.parity.sessions import PROVIDERS
from rewriter.report import Comparison
from rewriter.result import Result
from rewriter.target import Target
from rewriter.text import nbytes

LARGEST = 1 << 30
MOST_NODES = 20_000
"""Bytes of weights, and nodes, above which nobody is kept waiting without having asked."""


def compare(result: Result[Any], asked: bool | None, provider: str | None = None) -> Comparison:
    """Compares a saved result with the original model.

    Args:
        result: what was saved.
        asked: True compares or fails, False does not compare, None compares where it can be done cheaply. A rule set
            with limits asks for it.
        provider: what runs both models, which asks for it too; by default the target's.
    """
    limits = result.rule_set.parity
    wanted = asked or (asked is None and (limited(limits) or provider is not None))
    if asked is False:
        return Comparison(skipped="--no-check")
    size, nodes = result.report.bytes_before, max(result.nodes_before, sum(1 for _ in all_nodes(result.ir_model)))
    if not wanted and (size > LARGEST or nodes > MOST_NODES):
        large = f"{nbytes(size)} of weights" if size > LARGEST else f"{nodes:,} nodes"
        return Comparison(skipped=f"the model has {large} (--check compares all the same)")
    own = provider or Target.parse(result.report.target).provider
    if own not in (*PROVIDERS, "reference"):
        return _impossible(f"there is no {own} runtime on this machine", wanted)
    if reason := missing(own):
        return _impossible(reason, wanted)
    drawn = next((n for n in all_nodes(result.ir_model) if is_random(n) and "seed" not in n.attributes), None)
    if drawn is not None:
        random = f"node '{name_of(drawn)}' ({drawn.op_type}) draws other numbers each time that it runs"
        return _impossible(f"{random}; export the model for inference", wanted)
    try:
        parity = result.check(runtime=runtime(own, limits.timeout))
    except (OriginalError, UsageError) as error:
        return _impossible(f"the original does not run: {error}", wanted)
    except TargetError as error:
        return Comparison(failures=(f"the rewritten model does not run where the original does: {error}",))
    except ParityError as error:
        return Comparison(failures=(str(error),))
    quantized = any(node.op_type in QUANTIZED_OPERATORS for node in all_nodes(result.ir_model))
    expected = expected_l2(result.ir_model, result.report.weights, quantized=quantized)
    return dataclasses.replace(parity.comparison, failures=exceeded(parity, limits, expected))


def _impossible(reason: str, wanted: bool) -> Comparison:
    if not wanted:
        return Comparison(skipped=reason)
    return Comparison(skipped=reason, failures=(f"the comparison that was asked for cannot be made: {reason}",))

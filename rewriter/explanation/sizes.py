"""What each shipped rule set would make of a model's size: dry runs, nothing is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from rewriter import api
from rewriter.errors import RewriterError
from rewriter.ruleset import load


@dataclass(frozen=True)
class Outlook:
    """What one rule set would do.

    Attributes:
        rule_set: its name.
        bytes_after: size of the model; None where it cannot be run.
        rewrites: how many rules would fire.
        float_experts: bytes of the experts' weights that would stay float.
        problem: why it cannot be run; empty where it can.
    """

    rule_set: str
    bytes_after: int | None
    rewrites: int
    float_experts: int
    problem: str = ""


FEW = ("experts-int4", "moe-int4", "moe-int8")
"""Rule sets that are tried on a model on which all would take long: the others' sizes are near theirs."""


def outlooks(
    model: ir.Model, target: str | None, tell: Callable[[str], None], names: Iterable[str]
) -> Iterator[Outlook]:
    """Yields what each rule set would do, by name.

    Args:
        model: stays as it is.
        target: the runtime; None takes each rule set's own.
        tell: told the name of each as its turn comes.
        names: of the rule sets.
    """
    from rewriter.inspection.model import look  # noqa: PLC0415 -- the reader of a model is slow to import

    for name in names:
        tell(f"trying {name}")
        try:
            rules = load(name, overrides={"parity.local": "none"})
            result = api.apply(model, rules, target=target, prover=lambda rewrite, run: None)
        except RewriterError as error:
            yield Outlook(name, None, 0, 0, str(error))
            continue
        left = [h for h in look(result.ir_model).weights if h.role.startswith("expert") and h.kind == "float"]
        report = result.report
        yield Outlook(name, report.bytes_after, len(report.applications), sum(h.nbytes for h in left))

"""What several rule sets make of one model, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.report.quality import Quality
from rewriter.report.records import Metrics
from rewriter.text import figure, nbytes


@dataclass(frozen=True)
class Candidate:
    """What one rule set made of the model.

    Attributes:
        rule_set: its name.
        nbytes: of all tensors of the rewritten model; None where the rule set cannot be run.
        weights: how many were quantized.
        mean_error: their relative RMS errors, each counted by its numbers; None where there are none.
        worst_error: the largest of them.
        left: bytes of matrices that stay float.
        float_experts: of which belong to experts.
        seconds: to rewrite and to write.
        output: how the output that matters most differs on random inputs; None with tokens, or where it was not run.
        quality: how far the predictions are apart on tokens; None where none were given or it was not run.
        problem: why it cannot be run, or its result not be measured; empty where both went well.
    """

    rule_set: str
    nbytes: int | None = None
    weights: int = 0
    mean_error: float | None = None
    worst_error: float | None = None
    left: int = 0
    float_experts: int = 0
    seconds: float = 0.0
    output: Metrics | None = None
    quality: Quality | None = None
    problem: str = ""


@dataclass(frozen=True)
class Candidates:
    """Rule sets for one model.

    Attributes:
        model: its name.
        nbytes: of its tensors.
        tokens: positions that were compared; 0 where no tokens were given.
        rows: one for each rule set, in the order given.
    """

    model: str
    nbytes: int
    tokens: int
    rows: tuple[Candidate, ...]

    @property
    def table(self) -> list[list[str]]:
        """A row of headings, and one for each rule set."""
        if self.tokens:
            heads = ["perplexity", "KL", "KL, 99th percentile", "same token"]
        else:
            heads = ["output error", "SNR dB", "same token"]
        rows = [["rule set", "size", "of now", "weight error", "worst error", *heads, "seconds", "stays float"]]
        for row in self.rows:
            if row.nbytes is None:
                rows.append([row.rule_set, *["-"] * (len(rows[0]) - 2), row.problem])
                continue
            found: list[tuple[float | None, str]] = []
            if (q := row.quality) is not None:
                found = [(q.perplexity_increase.value, "+.2%"), (q.kl.value, ".4f")]
                found += [(q.kl_p99.value, ".3f"), (q.top1.value, ".1%")]
            elif (m := row.output) is not None:
                found = [(m.relative_l2, ".3g"), (m.snr_db, ".1f"), (m.top1, ".1%")]
            measured = [figure(*pair) for pair in found] or ["-"] * len(heads)
            share = f"{row.nbytes / self.nbytes:.1%}" if self.nbytes else "-"
            errors = [figure(row.mean_error, ".2%"), figure(row.worst_error, ".2%")]
            experts = f", {nbytes(row.float_experts)} of experts" if row.float_experts else ""
            stays = f"{nbytes(row.left)}{experts}" if row.left else "nothing"
            last = "; ".join(filter(None, (stays, row.problem)))
            rows.append([row.rule_set, nbytes(row.nbytes), share, *errors, *measured, f"{row.seconds:.1f}", last])
        return rows

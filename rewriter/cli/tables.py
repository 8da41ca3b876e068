"""Reports as tables: what fired, what declined, what quantization cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from rewriter.cli.console import TOP, Sheet
from rewriter.report import (
    Change,
    Comparison,
    LayerError,
    Left,
    Proof,
    Refusal,
    Report,
    RoleSummary,
    UsedRuleSet,
    Weight,
)
from rewriter.report.sized import Sized
from rewriter.text import figure, names, nbytes, plural

_LAYERS = 64
"""Layers whose experts are summed up."""

if TYPE_CHECKING:
    from rewriter.report.coverage import BlockCoverage
    from rewriter.report.quality import Quality


def fired(report: Report) -> Sheet:
    """Rule, count, how it was proved."""
    made = Sheet("What fired", "|rule", ">count", ">max error", "proof")
    proofs = _by_rule(report.proofs)
    for rule, count in report.applied.items():
        used = {a.proof for a in report.applications if a.rule == rule and a.proof is not None}
        error, how = _proof(proofs.get(rule, []), len(used))
        made.add(rule, f"{count:,}", error, how)
    return made


def would_fire(report: Report) -> Sheet:
    """Rule, count and first node."""
    made = Sheet("What would fire", "|rule", ">count", "first node")
    first = {a.rule: a.node for a in reversed(report.applications)}
    for rule, count in report.applied.items():
        made.add(rule, f"{count:,}", first[rule])
    return made


def declined(refusals: Sequence[Refusal], where: str) -> Sheet:
    """What each rule refused and why, what matters most first."""
    made = Sheet("What declined", ">count", "rule, reason, and first node")
    for refusal in refusals[:TOP]:
        together = " together" if len(refusal.declines) > 1 else ""
        stays = f"; {nbytes(refusal.nbytes)} stay float{together}" if refusal.nbytes else ""
        head = Text(f"{refusal.rule}: {refusal.reason}", style="dim" if refusal.expected else "")
        made.add(f"{len(refusal.declines):,}", head.append(f"\n{refusal.declines[0].node}{stays}", style="dim"))
    made.rest(len(refusals) - TOP, where)
    return made


def changed(changes: Sequence[Change], where: str) -> Sheet:
    """Where another form was written than the plan says, and why."""
    made = Sheet("Other forms than planned", ">count", "|role", "planned -> written, and why")
    for change in changes[:TOP]:
        made.add(f"{len(change.weights):,}", change.role or Text("(no role)", style="dim"), str(change))
    made.rest(len(changes) - TOP, where)
    return made


def misfits(report: Report) -> Sheet:
    """What the target refuses or computes wrongly in the rewritten model, by reason."""
    groups: dict[str, list[str]] = {}
    for misfit in report.misfits:
        groups.setdefault(misfit.reason, []).append(misfit.node)
    made = Sheet(f"What {report.target} refuses, or computes wrongly", ">count", "operator, reason, and first node")
    for reason, nodes in sorted(groups.items(), key=lambda group: -len(group[1])):
        made.add(f"{len(nodes):,}", Text(reason).append(f"\n{nodes[0]}", style="dim"))
    return made


def left(weights: Sequence[Left], top: int) -> Sheet:
    """The largest weights that stay float, and why."""
    made = Sheet("Largest weights left in float", ">size", "weight, what reads it, and why it stays")
    for weight in weights[:top]:
        role = f" ({weight.role})" if weight.role else ""
        why = f"{weight.rule}: {weight.reason}" if weight.rule else weight.reason
        read = f"read by {', '.join(weight.readers)}; " if weight.readers else ""
        made.add(nbytes(weight.nbytes), Text(f"{weight.name}{role}").append(f"\n{read}{why}", style="dim"))
    made.rest(len(weights) - top, f", {nbytes(sum(weight.nbytes for weight in weights[top:]))}")
    return made


def weights(summaries: Sequence[RoleSummary], *, measured: bool) -> Sheet | None:
    """Quantized weights by role; with their errors where they have been measured."""
    if not summaries:
        return None
    columns = ["|role", ">count", ">bits", ">stored", ">before", ">after"]
    made = Sheet("Quantized weights", *columns, *([">mean", ">worst"] if measured else []))
    for s in summaries:
        row = [s.role or Text("(no role)", style="dim"), f"{s.count:,}", ", ".join(map(str, s.bits))]
        row += [f"{s.bits_per_element:.3f}", nbytes(s.bytes_before), nbytes(s.bytes_after)]
        row += [_percent(s.mean_relative_rms), _percent(s.worst.relative_rms)] if measured else []
        made.add(*row)
    made.caption = "stored: bits of each number, with its scales and zero points"
    if measured:
        worst = max((s.worst for s in summaries), key=lambda w: w.relative_rms)
        made.caption += "\nmean, worst: relative RMS error, |dequantized - weight| / |weight|"
        made.caption += f"\nworst of all: {worst.name}"
    return made


def plan(rules: UsedRuleSet | None) -> Sheet | None:
    """What each line of the plan came to, those that decide nothing last and in part; None of a bare plan."""
    lines = () if rules is None else rules.plan
    if len(lines) < 2:
        return None
    made = Sheet("Plan", ">weights", "line")
    shown = max(TOP, sum(not line.dead for line in lines))
    for line in sorted(lines, key=lambda line: line.dead)[:shown]:
        values = ", ".join(f"{name} {value}" for name, value in line.values.items() if value != "int")
        text = Text(": ".join(filter(None, (f"{line.kind} {line.selects}".strip(), values))))
        if line.kind == "exclude":
            text.append(": stays float")
        if line.idle:
            text.append(f"\n{line.idle}", style="yellow")
        made.add("-" if line.weights is None else f"{line.weights:,}", text)
    made.rest(len(lines) - shown, " that decide nothing")
    return made


def sizes(why: Sized) -> Sheet | None:
    """What other sizes would give, beside the chosen one; None where there is no other."""
    if len(why.sizes) < 2:
        return None
    made = Sheet("Other sizes", ">size", ">bits a weight", ">expected KL" if why.tokens else ">times the error", "|")
    for size in why.sizes:
        error = f"{size.error:.4f}" if why.tokens else f"{size.error:.2f}"
        made.add(nbytes(size.nbytes), f"{size.bits:.2f}", error, "chosen" if size.chosen else "")
    if why.tokens:
        made.caption = f"KL in nats, on {why.tokens:,} tokens of the calibration; on others it may be a fifth more"
    return made


def output_errors(errors: Sequence[LayerError]) -> Sheet | None:
    """Errors of what weights return, on what they saw, the worst layers first; None where nothing is known of it."""
    if not errors:
        return None
    made = Sheet("Output errors, worst first", "|layer", "|role", ">count", ">mean", ">worst", "worst weight")
    for e in errors[:TOP]:
        layer = "-" if e.layer is None else str(e.layer)
        made.add(layer, e.role or "-", f"{e.count:,}", _percent(e.mean), _percent(e.largest), e.worst.name)
    made.rest(len(errors) - TOP)
    made.caption = "|x (dequantized - weight)| / |x weight|, x what the weight saw when it was calibrated"
    return made


def accepted(rules: UsedRuleSet | None) -> str:
    """Says what the rule set accepts of kernels that round activations; empty where it leaves them as they are."""
    given = {} if rules is None else {key: value for key, value in rules.activations.items() if value}
    shown = ", ".join(f"{key}: {str(value).lower()}" for key, value in given.items())
    return f"Kernels may round activations to 8 bits ({shown})" if shown else ""


def not_calibrated(weights: Sequence[Weight]) -> str:
    """Says how many weights were not quantized by the algorithm that goes by their inputs; empty where all were."""
    planned = [weight for weight in weights if weight.planned_algorithm is not None]
    if not planned:
        return ""
    why: dict[str, Counter[str]] = {}
    for weight in planned:
        why.setdefault(weight.uncalibrated, Counter())[weight.role or "of no role"] += 1
    told = [
        f"{reason} ({', '.join(f'{count:,} {role}' for role, count in roles.items())})" for reason, roles in why.items()
    ]
    many, first = plural(len(planned), "weight"), planned[0]
    return f"{many} planned for {first.planned_algorithm}, quantized by {first.algorithm} instead: {'; '.join(told)}"


def metrics(title: str, found: Comparison, *, limit: int | None = TOP) -> Sheet:
    """One row per output: logits first, then the largest difference."""
    outputs = found.worst_first
    logits = any(m.top1 is not None for _, m in outputs)
    columns = ("output", ">relative L2", ">max abs", ">cosine", ">SNR dB")
    made = Sheet(title, *columns, *((">top-1", ">KL") if logits else ()), "|worst at")
    for name, m in outputs[:limit]:
        if not m.compared:
            made.add(name, *["-"] * (len(made) - 1))
            continue
        row = [name, figure(m.relative_l2), figure(m.max_abs), figure(m.cosine, ".6f"), figure(m.snr_db, ".1f")]
        row += [figure(m.top1, ".1%"), figure(m.kl)] if logits else []
        made.add(*row, str(list(m.worst_index)) if m.worst_index else "-")
    made.rest(0 if limit is None else len(outputs) - limit)
    if not all(m.compared for _, m in outputs):
        made.caption = "-: no finite number in either model, so nothing was compared"
    return made


def _by_rule(proofs: Iterable[Proof]) -> dict[str, list[Proof]]:
    found: dict[str, list[Proof]] = {}
    for proof in proofs:
        found.setdefault(proof.rule, []).append(proof)
    return found


def _proof(proofs: Sequence[Proof], used: int) -> tuple[str, str]:
    run = [p for p in proofs if not p.skipped]
    skipped = len(proofs) - len(run)
    if not proofs or not used:
        return "-", "not run (--parity none); every weight was read back"
    error = figure(max(p.max_relative for p in run)) if run else "-"
    many = plural(len(run), "class", "classes")
    how = f"{many} run ({names(sorted({p.runtime for p in run}))})" if run else ""
    if skipped:
        how += f"{', ' if how else ''}{skipped:,} too large to run (parity.max_bytes)"
    return error, how


def _percent(value: float) -> str:
    return figure(value, ".2%")


def coverage(blocks: Sequence[BlockCoverage]) -> Sheet | None:
    """Tokens by expert, summed up for each layer; None where there are no experts."""
    if not blocks:
        return None
    made = Sheet(
        "Tokens that experts saw", "|layer", ">experts", ">fewest", ">median", ">most", ">none", ">few", "seen least"
    )
    made.caption = "few: fewer tokens than an expert has input features, which tell little"
    if any(block.none for block in blocks):
        made.caption += "\nnone: no token came by; such experts are rounded by their weights alone"
    if any(block.few for block in blocks):
        made.caption += "\nmore tokens of another kind help; more of the same do not"
    for block in blocks[:_LAYERS]:
        shown = ", ".join(f"{expert} ({block.counts[expert]:,})" for expert in block.least[:4])
        numbers = (len(block.counts), min(block.counts), block.median, max(block.counts), block.none, block.few)
        made.add("-" if block.layer is None else str(block.layer), *(f"{number:,}" for number in numbers), shown)
    made.rest(len(blocks) - _LAYERS)
    return made


def quality(found: Quality) -> Sheet:
    """Perplexity, KL divergence and top-1 agreement, with their intervals."""
    made = Sheet("Quality", "|measure", ">value", ">95% interval")
    for name, estimate, form in found.rows:
        low, high = figure(estimate.low, form), figure(estimate.high, form)
        made.add(name, figure(estimate.value, form), "-" if estimate.low is None else f"{low} to {high}")
    return made

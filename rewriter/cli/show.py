"""Reports as tables: what fired, what declined, what quantization cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewriter.cli.console import TOP, rest, table
from rewriter.report import Decline, Proof, Report, RoleSummary
from rewriter.wording import figure, names, nbytes

if TYPE_CHECKING:
    from rewriter.parity.metrics import Metrics


_WIDE = 140
_ROOMY = 100
"""Columns of a terminal that has room for names of weights, and for indices, in tables of figures."""


def show(out: Console, *parts: Table | None) -> None:
    """Prints tables, each followed by an empty line; None is nothing."""
    for part in parts:
        if part is not None:
            out.print(part)
            out.print()


def fired(report: Report) -> Table | None:
    """Rule, count, how it was proved; None where nothing fired."""
    if not report.applications:
        return None
    made = table("What fired", "|rule", ">count", ">max error", "proof")
    proofs = _by_rule(report.proofs)
    for rule, count in report.applied.items():
        used = {a.proof for a in report.applications if a.rule == rule and a.proof is not None}
        error, how = _proof(proofs.get(rule, []), len(used))
        made.add_row(rule, f"{count:,}", error, how)
    return made


def would_fire(report: Report) -> Table | None:
    """Rule, count and first node; None where nothing would fire."""
    if not report.applications:
        return None
    made = table("What would fire", "|rule", ">count", "first node")
    first = {a.rule: a.node for a in reversed(report.applications)}
    for rule, count in report.applied.items():
        made.add_row(rule, f"{count:,}", first[rule])
    return made


def declined(report: Report, where: str) -> Table | None:
    """Rule, reason, count and first node, the most frequent first; None where nothing declined."""
    if not report.declines:
        return None
    groups: dict[tuple[str, str], list[Decline]] = {}
    for decline in report.declines:
        groups.setdefault((decline.rule, decline.reason), []).append(decline)
    made = table("What declined", "|rule", "reason", ">count", "first node")
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    for (rule, reason), group in ordered[:TOP]:
        made.add_row(rule, reason, f"{len(group):,}", group[0].node)
    rest(made, len(ordered) - TOP, where)
    return made


def weights(summaries: Sequence[RoleSummary], *, measured: bool, width: int) -> Table | None:
    """Quantized weights by role; with their errors where they have been measured, and names where there is room."""
    if not summaries:
        return None
    columns = ["|role", ">count", ">bits", ">stored", ">before", ">after"]
    named = width >= _WIDE
    errors = [">mean", ">worst", *(["worst weight"] if named else [])]
    made = table("Quantized weights", *columns, *(errors if measured else []))
    for s in summaries:
        row = [s.role or Text("(no role)", style="dim"), f"{s.count:,}", ", ".join(map(str, s.bits))]
        row += [f"{s.bits_per_element:.3f}", nbytes(s.bytes_before), nbytes(s.bytes_after)]
        if measured:
            row += [_percent(s.mean_relative_rms), _percent(s.worst.relative_rms)]
            row += [s.worst.name] if named else []
        made.add_row(*row)
    made.caption = "stored: bits of each number, with its scales and zero points"
    if measured:
        worst = max((s.worst for s in summaries), key=lambda w: w.relative_rms)
        made.caption += "\nmean, worst: relative RMS error, |dequantized - weight| / |weight|"
        made.caption += "" if named else f"\nworst of all: {worst.name}"
    return made


def metrics(title: str, outputs: Mapping[str, Metrics], *, width: int, limit: int | None = TOP) -> Table:
    """One row per output: logits first, then the largest difference."""
    placed = width >= _ROOMY
    columns = ("output", ">relative L2", ">max abs", ">cosine", ">SNR dB")
    logits = any(m.top1 is not None for m in outputs.values())
    made = table(title, *columns, *((">top-1", ">KL") if logits else ()), *(("worst at",) if placed else ()))
    ordered = sorted(outputs.items(), key=lambda item: (item[1].top1 is None, -item[1].relative_l2))
    for name, m in ordered[:limit]:
        if not m.compared:
            made.add_row(name, *["-"] * (len(made.columns) - 1))
            continue
        row = [name, figure(m.relative_l2), figure(m.max_abs), figure(m.cosine, ".6f"), figure(m.snr_db, ".1f")]
        row += [figure(m.top1, ".1%"), figure(m.kl)] if logits else []
        row += [str(list(m.worst_index)) if m.worst_index else "-"] if placed else []
        made.add_row(*row)
    rest(made, 0 if limit is None else len(ordered) - limit, "")
    if not all(m.compared for m in outputs.values()):
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
    many = f"{len(run):,} class{'es' if len(run) != 1 else ''}"
    how = f"{many} run ({names(sorted({p.runtime for p in run}))})" if run else ""
    if skipped:
        how += f"{', ' if how else ''}{skipped:,} too large to run"
    return error, how


def _percent(value: float) -> str:
    return figure(value, ".2%")

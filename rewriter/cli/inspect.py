"""``rewriter inspect``: what a model is, and what each rule set would make of its size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.options import AsJson, Model, TargetName
from rewriter.text import nbytes, plural

if TYPE_CHECKING:
    from rewriter.cli.console import Sheet
    from rewriter.explanation.sizes import Outlook
    from rewriter.inspection.blocks import Block
    from rewriter.inspection.model import ModelInfo


def inspect(
    model: Model,
    target: TargetName = None,
    sizes: Annotated[
        bool | None,
        typer.Option(
            "--sizes/--no-sizes",
            show_default=False,
            help="Say what each rule set would do to the size; by default below 20,000 nodes.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model is: layers, MoE blocks and their form, weights by role, and what rule sets would make of it.

    Nothing is quantized, run or written.

    [bold]rewriter inspect model.onnx[/bold]
        who wrote it, what is in it, how small it would get
    [bold]rewriter inspect model.onnx --json[/bold]
        the same for a program
    """
    from rewriter.cli import comparison
    from rewriter.cli.console import print_json, working
    from rewriter.explanation.sizes import FEW, outlooks
    from rewriter.inspection.model import look
    from rewriter.io import load
    from rewriter.report import document
    from rewriter.ruleset import rule_sets
    from rewriter.target import Target

    if target is not None:
        Target.parse(target)
    with working(f"reading {model}", quiet=as_json) as tell:
        original = load(model)
        info = look(original)
        few = sizes is None and info.nodes > comparison.MOST_NODES
        found = () if sizes is False else tuple(outlooks(original, target, tell, FEW if few else rule_sets()))
    if as_json:
        print_json({**document(info), "rule_sets": [dataclasses.asdict(outlook) for outlook in found]})
        return
    _show(f"{model}", info, found, few=few)


def _show(model: str, info: ModelInfo, found: Sequence[Outlook], *, few: bool) -> None:
    from rich.text import Text

    from rewriter.cli.console import console, labelled, show

    screen = console()
    screen.print(Text.assemble((model, "bold"), f"  {nbytes(info.nbytes)} of tensors"), soft_wrap=True)
    functions = f"; {plural(info.functions, 'function')}" if info.functions else ""
    operators = ", ".join(f"{name} {count:,}" for name, count in info.operators.items())
    for label, text in (
        ("written by", info.producer or "unknown"),
        ("opsets", ", ".join(f"{domain} {version}" for domain, version in info.opsets.items())),
        ("nodes", f"{info.nodes:,}: {operators} ...{functions}"),
        ("inputs", ", ".join(list(info.inputs)[:6]) + (" ..." if len(info.inputs) > 6 else "")),
        ("layers", f"{info.layers}, of which {len({b.layer for b in info.blocks})} with experts"),
    ):
        screen.print(labelled(label, text, 12), soft_wrap=True)
    for made in info.made:
        screen.print(labelled("rewritten", str(made), 12), soft_wrap=True)
    screen.print()
    show(screen, _blocks(info.blocks), _weights(info), _sizes(info, found))
    if not info.blocks:
        screen.print("No MoE block was recognised.")
    if found and not _changed(found):
        screen.print("No rule of these rule sets would fire: " + ", ".join(outlook.rule_set for outlook in found))
    if few:
        screen.print(f"With {info.nodes:,} nodes, a few rule sets were tried; --sizes tries all", style="dim")


def _blocks(blocks: Sequence[Block]) -> Sheet:
    """The blocks, equal ones in one row."""
    from rewriter.cli.console import Sheet

    groups: dict[Block, list[Block]] = {}
    for block in blocks:
        groups.setdefault(dataclasses.replace(block, layer=None, first=""), []).append(block)
    made = Sheet("MoE blocks", "|layers", "form", ">experts", ">top-k", "rows of an expert", ">nodes", "first node")
    for kind, group in groups.items():
        experts, top_k = (str(n) if n is not None else "-" for n in (kind.experts, kind.top_k))
        form = f"{kind.form}, {kind.activation}" if kind.activation else kind.form
        layers = _ranges([block.layer for block in group])
        made.add(layers, form, experts, top_k, kind.rows or "-", f"{kind.nodes:,}", group[0].first)
    return made


def _ranges(layers: Sequence[int | None]) -> str:
    """Returns ``0-2, 5`` for 0, 1, 2 and 5."""
    known = sorted({layer for layer in layers if layer is not None})
    runs: list[list[int]] = []
    for layer in known:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    texts = [f"{first}-{last}" if last > first else f"{first}" for first, last in runs]
    return ", ".join(texts + (["-"] if None in layers else []))


def _weights(info: ModelInfo) -> Sheet:
    from rich.text import Text

    from rewriter.cli.console import Sheet

    made = Sheet("Weights", "|role", "stored as", ">count", ">numbers", ">size", ">share")
    small = info.nbytes / 1000
    rest = [holding for holding in info.weights if not holding.role and holding.nbytes < small]
    for h in info.weights:
        if h in rest:
            continue
        role = h.role or Text("(no role)", style="dim")
        share = f"{h.nbytes / info.nbytes:.1%}" if info.nbytes else "-"
        made.add(role, h.stored, f"{h.count:,}", f"{h.elements:,}", nbytes(h.nbytes), share)
    if rest:
        made.caption = f"and {sum(h.count for h in rest):,} small constants, {nbytes(sum(h.nbytes for h in rest))}"
    return made


def _changed(found: Sequence[Outlook]) -> list[Outlook]:
    """The rule sets that have something to say: of which a rule would fire, or that cannot be used."""
    return [outlook for outlook in found if outlook.rewrites or outlook.problem]


def _sizes(info: ModelInfo, found: Sequence[Outlook]) -> Sheet | None:
    from rewriter.cli.console import Sheet

    shown = _changed(found)
    if not shown:
        return None
    columns = ("|rule set", ">size", ">of now", ">rewrites", ">float experts")
    made = Sheet("What each rule set would make of it", *columns)
    idle = [outlook for outlook in found if outlook not in shown]
    said = [f"{', '.join(outlook.rule_set for outlook in idle)}: no rule would fire"] if idle else []
    made.caption = "\n".join(said + [f"{o.rule_set} cannot be used: {o.problem}" for o in found if o.problem])
    for outlook in shown:
        after = outlook.bytes_after
        if after is None:
            made.add(outlook.rule_set, "-", "-", "-", "-")
            continue
        share = f"{after / info.nbytes:.1%}" if info.nbytes else "-"
        left = nbytes(outlook.float_experts) if outlook.float_experts else "none"
        made.add(outlook.rule_set, nbytes(after), share, f"{outlook.rewrites:,}", left)
    return made

"""``rewriter compare``: what several rule sets make of one model, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options
from rewriter.cli.options import AsJson, Model, Settings, TargetName, given
from rewriter.cli.token_options import Length, Sequences, Text, Tokenizer, Tokens, given_tokens
from rewriter.text import nbytes


def compare(
    model: Model,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RULES]...",
            show_default=False,
            help="Rule sets, by name or file.",
            autocompletion=options.complete_rule_sets,
        ),
    ] = None,
    rules: Annotated[
        list[str],
        given(
            "NAME|FILE",
            "The same as an option; by default rtn, k-quant, moe-int4 and moe-int8.",
            "--rules",
            "-r",
            autocompletion=options.complete_rule_sets,
        ),
    ] = [],
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    length: Length = 512,
    sequences: Sequences = None,
    calibration: Annotated[Path | None, given("FOLDER", "For sets with gptq: what rewriter calibrate wrote.")] = None,
    imatrix: Annotated[Path | None, given("FILE", "Mean squared activations, as for rewriter apply.")] = None,
    target: TargetName = None,
    settings: Settings = [],
    html: Annotated[Path | None, given("FILE.html", "Write the table as a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which rule set to take: size, weight error, output error, time and what stays float, of each.

    Each set is run and its result measured in a temporary folder; nothing of it is kept, and rewrites are not proved.

    [bold]rewriter compare model.onnx rtn k-quant moe-int4[/bold]
        outputs on random inputs, where the model is small
    [bold]rewriter compare model.onnx rtn mine.yaml --tokens tokens.npy[/bold]
        perplexity and KL divergence on real tokens: what quantization costs
    """
    from rich.text import Text as Line

    from rewriter.cli import report_files
    from rewriter.cli.console import Sheet, console, labelled, print_json, show, working
    from rewriter.explanation.candidates import compare as compared
    from rewriter.report import document
    from rewriter.ruleset import parse_override

    if html is not None:
        report_files.refuse_page(html, None, "sets.html")
    ids = given_tokens(tokens, text, tokenizer, length, sequences)
    chosen = list(dict.fromkeys([*rules, *(more or [])])) or ["rtn", "k-quant", "moe-int4", "moe-int8"]
    for name in chosen:
        options.rule_set(name, settings)  # a wrong name is said before the first is run
    with working(f"reading {model}", quiet=as_json) as tell:
        found = compared(
            model,
            chosen,
            tokens=ids,
            progress=tell,
            target=target,
            calibration=calibration,
            imatrix=imatrix,
            overrides=dict(map(parse_override, settings)),
        )
    if html is not None:
        from rewriter.html import candidates_page

        report_files.write(html, candidates_page(found))
    if as_json:
        print_json(document(found))
        return
    screen = console()
    screen.print(Line.assemble((found.model, "bold"), f"  {nbytes(found.nbytes)}\n"), soft_wrap=True)
    heads, *rows = found.table
    sheet = Sheet("Rule sets", f"|{heads[0]}", *(f">{head}" for head in heads[1:-1]), heads[-1])
    for row in rows:
        sheet.add(*row)
    where = f"{found.tokens:,} positions of real tokens" if found.tokens else "random inputs"
    sheet.caption = f"weight error: relative RMS, each weight counted by its numbers; outputs on {where}"
    show(screen, sheet)
    if html is not None:
        screen.print(labelled("Page", html), soft_wrap=True)

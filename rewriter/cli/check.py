"""``rewriter check``: how far the outputs of any two models are apart."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.options import AsJson, Quiet, finite, given
from rewriter.cli.token_options import Length, Memory, Sequences, Text, Tokenizer, Tokens, given_tokens
from rewriter.errors import ParityError, UsageError, nearest

if TYPE_CHECKING:
    from rewriter.cli.console import Sheet
    from rewriter.report import Comparison, Quality


def check(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", show_default=False, help="The model as it should be.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", show_default=False, help="The model to measure.")],
    runtime: Annotated[
        str, typer.Option("--runtime", "--provider", metavar="cpu|cuda|reference", help="What runs both.")
    ] = "cpu",
    inputs: Annotated[Path | None, given("FILE.npz", "Arrays to feed, by input name; by default random ones.")] = None,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    length: Length = 512,
    sequences: Sequences = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random inputs.")] = 0,
    logits: Annotated[
        list[str],
        given("OUTPUT", "An output to compare as logits; by default those named logits. May be repeated."),
    ] = [],
    max_relative_l2: Annotated[
        float | None, given("X", "Fail if the relative L2 difference of an output is larger.", min=0)
    ] = None,
    min_snr_db: Annotated[
        float | None, given("DB", "Fail if an output's signal-to-noise ratio is lower.", callback=finite)
    ] = None,
    min_top1: Annotated[
        float | None, given("SHARE", "Fail if the most likely token is the same more rarely.", min=0, max=1)
    ] = None,
    max_kl: Annotated[float | None, given("X", "Fail if the mean KL divergence on tokens is larger.", min=0)] = None,
    memory: Memory = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Longest time for one run of a model.")
    ] = 3600.0,
    html: Annotated[Path | None, given("FILE.html", "Write the table as a page.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run two models on the same inputs and measure how far their outputs are apart.

    [bold]rewriter check model.onnx out/model.onnx[/bold]
        on seeded random inputs
    [bold]rewriter check model.onnx out/model.onnx --inputs feeds.npz --min-top1 0.95[/bold]
        on inputs of your own, exit 1 where fewer than 95% of the best tokens agree
    [bold]rewriter check model.onnx out/model.onnx --tokens tokens.npy --max-kl 0.05[/bold]
        perplexity, KL divergence and top-1 agreement on real tokens, with their 95% intervals
    [bold]rewriter check model.onnx out/model.onnx --json[/bold]
        the same for a program
    """
    from rewriter.cli import report_files, tables
    from rewriter.cli.console import count_bar, working
    from rewriter.parity.limits import exceeded, too_far
    from rewriter.parity.model import check
    from rewriter.parity.quality import compare_quality
    from rewriter.parity.runs import read_feeds
    from rewriter.parity.runtime import runtime as find_runtime
    from rewriter.ruleset import ParitySettings

    if html is not None:
        report_files.refuse_page(html, None, "check.html")
    tell = partial(_tell, before, after, runtime, html=html, as_json=as_json, quiet=quiet)
    ids = given_tokens(tokens, text, tokenizer, length, sequences)
    if ids is not None:
        for option, given in (
            ("--inputs", inputs),
            ("--max-relative-l2", max_relative_l2),
            ("--min-snr-db", min_snr_db),
        ):
            if given is not None:
                raise UsageError(f"{option} is not about tokens; give the one or the other")
        if len(logits) > 1:
            raise UsageError("--logits may be given once with tokens")
        with count_bar("running both models", "sequences", quiet=quiet or as_json) as told:
            try:
                found = compare_quality(
                    before, after, ids, provider=runtime, logits="".join(logits), memory=memory, progress=told
                )
            except ParityError as error:  # no figure of a comparison, but two models that have none
                raise UsageError(str(error)) from error
        found = replace(found, failures=too_far(found, max_kl, min_top1))
        tell(f"{found.sequences:,} sequences, {found.tokens:,} tokens", found, tables.quality(found))
        return
    for option, given in (("--max-kl", max_kl), ("--memory", memory)):
        if given is not None:
            raise UsageError(f"{option} is about --tokens or --text")
    feeds = None if inputs is None else read_feeds(inputs)
    limits = ParitySettings(max_relative_l2=max_relative_l2, min_snr_db=min_snr_db, min_top1=min_top1)
    with working("running both models", quiet=quiet or as_json):
        try:
            parity = check(
                before, after, feeds=feeds, seed=seed, runtime=find_runtime(runtime, timeout), logits=logits or None
            )
        except ParityError as error:  # no figure of a comparison, but two models that have none
            raise UsageError(str(error)) from error
    for name in logits:
        if name not in parity.outputs:
            raise UsageError(f"--logits {name}: the models have no such output{nearest(name, parity.outputs)}")
    source = f"random inputs, seed {seed}" if inputs is None else str(inputs)
    compared = replace(parity.comparison, failures=exceeded(parity, limits))
    tell(source, compared, tables.metrics("How far the outputs are apart", compared, limit=None))


def _tell(
    before: Path,
    after: Path,
    runtime: str,
    inputs: str,
    found: Comparison | Quality,
    sheet: Sheet,
    *,
    html: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prints what was found on some inputs; ends the command where limits do not hold."""
    from rich.text import Text

    from rewriter.cli.console import console, labelled, print_json, shout, show
    from rewriter.report import document

    if html is not None:
        from rewriter.cli import report_files
        from rewriter.html import check_page

        report_files.write(html, check_page(f"{before}", f"{after}", inputs, found))
    if as_json:
        print_json(document(found), quiet=quiet)
    else:
        screen = console(quiet=quiet)
        names = ((f"{after}", "bold"), " against ", (f"{before}", "bold"))
        screen.print(Text.assemble(*names, f", run by {runtime} on {inputs}\n"), soft_wrap=True)
        show(screen, sheet)
        if html is not None:
            screen.print(labelled("Page", html), soft_wrap=True)
    for failure in found.failures:
        shout(failure)
    if found.failures:
        raise typer.Exit(1)

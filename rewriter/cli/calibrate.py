"""``rewriter calibrate``: what the weights of a model see on real tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli.options import Model, Quiet, given
from rewriter.cli.token_options import Length, Memory, Sequences, Text, Tokenizer, Tokens
from rewriter.errors import UsageError
from rewriter.text import nbytes


def calibrate(
    model: Model,
    out: Annotated[Path, given("FOLDER", "Where the calibration goes.", "--out", "-o")],
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    length: Length = 512,
    sequences: Sequences = None,
    feeds: Annotated[
        Path | None, given("FOLDER", "In place of tokens: an .npz file for each run, with an array for each input.")
    ] = None,
    provider: Annotated[str, typer.Option(metavar="cpu|cuda", help="What runs the model.")] = "cpu",
    memory: Memory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing calibration.")] = False,
    html: Annotated[Path | None, given("FILE.html", "Write a page that shows what each expert saw.")] = None,
    quiet: Quiet = False,
) -> None:
    r"""Run a float model on real tokens and keep what each of its weights saw, each expert its own.

    Some ten thousand tokens of the kind that the model will meet are enough for most experts.
    The folder takes two bytes for each number that a weight saw.

    [bold]rewriter calibrate model.onnx --tokens tokens.npy -o calibration[/bold]
        token ids \[sequences, length]
    [bold]rewriter calibrate model.onnx --text book.txt --tokenizer tokenizer.json -o calibration[/bold]
        text, cut into sequences of 512 tokens
    [bold]rewriter calibrate model.onnx --feeds inputs -o calibration[/bold]
        inputs of your own, an .npz file for each run
    """
    from rich.text import Text as Line

    from rewriter.calibration.capture import calibrate as capture
    from rewriter.cli import report_files, tables
    from rewriter.cli.console import console, count_bar, labelled, show
    from rewriter.cli.token_options import given_tokens

    ids = given_tokens(tokens, text, tokenizer, length, sequences)
    if (ids is None) == (feeds is None):
        raise UsageError("give the inputs to calibrate on: --tokens, --text with --tokenizer, or --feeds")
    if feeds is not None and not feeds.is_dir():
        raise UsageError(f"--feeds {feeds}: there is no such directory; give one with an .npz file for each run")
    if html is not None:
        report_files.refuse_page(html, out, "calibration.html")
    files = None if feeds is None else sorted(feeds.glob("*.npz"))
    with count_bar(f"running {model}", "runs", quiet=quiet) as told:
        found = capture(
            model, out, tokens=ids, feeds=files, provider=provider, overwrite=overwrite, memory=memory, progress=told
        )
    screen = console(quiet=quiet)
    seen = found.coverage(str(model))
    told_of = f" on {seen.tokens:,} tokens: {seen.weights:,} stored weights (a stack of experts is one) saw something\n"
    screen.print(Line.assemble((seen.model, "bold"), told_of))
    show(screen, tables.coverage(seen.blocks))
    screen.print(labelled("Size", nbytes(sum((out / file).stat().st_size for file in found.files))))
    screen.print(labelled("Output", out), soft_wrap=True)
    if html is not None:
        from rewriter.html import coverage_page

        report_files.write(html, coverage_page(seen))
        screen.print(labelled("Page", html), soft_wrap=True)

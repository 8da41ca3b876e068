"""``rewriter check``: how far the outputs of any two models are apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.options import AsJson

if TYPE_CHECKING:
    from rewriter.parity.runtime import Array


def check(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", show_default=False, help="The model as it should be.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", show_default=False, help="The model to measure.")],
    runtime: Annotated[str, typer.Option(metavar="cpu|cuda|reference", help="What runs both.")] = "cpu",
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", show_default=False, help="Arrays to feed, by input name; by default random ones."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    logits: Annotated[
        list[str],
        typer.Option(
            metavar="OUTPUT",
            show_default=False,
            help="An output to compare as logits; by default those named so. May be repeated.",
        ),
    ] = [],
    max_relative_l2: Annotated[
        float | None, typer.Option(min=0, metavar="X", show_default=False, help="Fail where an output differs by more.")
    ] = None,
    min_snr_db: Annotated[
        float | None, typer.Option(metavar="DB", show_default=False, help="Fail where an output's SNR is lower.")
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            show_default=False,
            help="Fail where logits agree on the best token more rarely.",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print failures only.")] = False,
) -> None:
    """Run two models on the same inputs and measure how far their outputs are apart.

    [bold]rewriter check model.onnx out/model.onnx[/bold]
        on seeded random inputs
    [bold]rewriter check model.onnx out/model.onnx --inputs feeds.npz --min-top1 0.95[/bold]
        on inputs of your own, exit 1 where fewer than 95% of the best tokens agree
    [bold]rewriter check model.onnx out/model.onnx --json[/bold]
        the same for a program
    """
    from dataclasses import replace

    from rich.text import Text

    from rewriter.cli import tables
    from rewriter.cli.console import console, print_json, shout, show, working
    from rewriter.errors import ParityError, UsageError, nearest
    from rewriter.parity.limits import exceeded
    from rewriter.parity.model import check
    from rewriter.parity.runtime import runtime as find_runtime
    from rewriter.report import document
    from rewriter.ruleset import ParitySettings

    feeds = None if inputs is None else _feeds(inputs)
    limits = ParitySettings(max_relative_l2=max_relative_l2, min_snr_db=min_snr_db, min_top1=min_top1)
    with working("running both models", quiet=quiet or as_json):
        try:
            parity = check(before, after, feeds=feeds, seed=seed, runtime=find_runtime(runtime), logits=logits or None)
        except ParityError as error:  # no figure of a comparison, but two models that have none
            raise UsageError(str(error)) from error
    for name in logits:
        if name not in parity.outputs:
            raise UsageError(f"--logits {name}: the models have no such output{nearest(name, parity.outputs)}")
    failures = exceeded(parity, limits)
    if as_json:
        print_json(document(replace(parity.comparison, failures=failures)), quiet=quiet)
    else:
        source = f"random inputs, seed {seed}" if inputs is None else str(inputs)
        screen = console(quiet=quiet)
        names = ((f"{after}", "bold"), " against ", (f"{before}", "bold"))
        screen.print(Text.assemble(*names, f", run by {runtime} on {source}\n"), soft_wrap=True)
        show(screen, tables.metrics("How far the outputs are apart", parity.outputs, limit=None))
    for failure in failures:
        shout(failure)
    if failures:
        raise typer.Exit(1)


def _feeds(file: Path) -> dict[str, Array]:
    import numpy as np

    from rewriter.errors import UsageError

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as error:
        raise UsageError(f"there is no file '{file}'; give an .npz file with an array for each input") from error
    except Exception as error:  # what numpy raises depends on the bytes it meets
        raise UsageError(f"'{file}' is not an .npz file of plain arrays; write it with numpy.savez") from error

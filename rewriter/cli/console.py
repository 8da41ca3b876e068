"""How things look on a terminal: tables, sizes, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

TOP = 10
"""Rows of a table that may be long."""

_PIPED_WIDTH = 160


class _Screen(Console):
    """Prints names as they are, brackets included; output that nobody reads any more is no failure of the command."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(*, quiet: bool = False) -> Console:
    """Returns where results go; a pipe or a file gets plain text, wide enough for names."""
    found = _Screen(quiet=quiet, highlight=False, markup=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = _PIPED_WIDTH
    return found


def labelled(label: str, text: object, width: int = 8) -> Text:
    """Returns a line that begins with what it is about."""
    return Text.assemble((f"{label:<{width}}", "dim"), str(text))


def shout(message: str) -> None:
    """Says on stderr that something failed which leaves the output in place."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("FAILED ", "bold red"), message))


def table(title: str, *columns: str) -> Table:
    """Returns an empty table; the heading of a column of numbers starts with ``>``, of short names with ``|``."""
    made = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        header_style="dim",
        caption_justify="left",
        caption_style="dim",
    )
    for column in columns:
        kind = column[0] if column[0] in ">|" else ""
        justify: Literal["left", "right"] = "right" if kind == ">" else "left"
        made.add_column(column.removeprefix(kind), justify=justify, no_wrap=bool(kind), overflow="fold")
    return made


def rest(made: Table, left: int, where: str) -> None:
    """Adds the row that says how many more there are."""
    if left > 0:
        made.add_row(*[""] * (len(made.columns) - 1), Text(f"and {left:,} more{where}", style="dim"))


@contextmanager
def working(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows a spinner on a terminal; gives a function that changes its text."""
    if quiet or not sys.stderr.isatty():
        yield lambda changed: None
        return
    with Console(stderr=True, highlight=False, markup=False).status(text) as status:
        yield status.update


@contextmanager
def byte_bar(text: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Shows a bar of bytes with the time left on a terminal; gives what tells it bytes done and bytes in all."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

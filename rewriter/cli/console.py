"""How things look on a terminal: tables, sizes, progress."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rewriter.text import nbytes, printable, shortened

T = TypeVar("T")

Told = Callable[[int, int], None]
"""Is told how much is done, and of how much."""

TOP = 10
"""Rows of a table that may be long."""

SECONDS = 10.0
"""Between two lines that say what is being done, where there is no terminal."""

_PIPED_WIDTH = 160

_READABLE = 16
"""Columns of the terminal that a text needs, so that it is worth wrapping."""

_SPARE = (
    "worst at", "read by", "nodes", "max abs", "seconds", "of now", "stored", "before", "cosine", "mean", "max error",
    "numbers", "rewrites", "options", "rows of an expert", "worst error", "KL, 99th percentile", "SNR dB", "KL",
)  # fmt: skip
"""What a narrow terminal can do without, the least first."""


class _Screen(Console):
    """Prints names as they are, brackets included, but for what a terminal would obey, and the middle of endless ones.

    Output that nobody reads any more is no failure of the command.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_cut, objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

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


class Sheet:
    """A table that has yet to be laid out for a terminal.

    Attributes:
        caption: what is said below it.
    """

    def __init__(self, title: str, *columns: str) -> None:
        """Prepares.

        Args:
            title: above it.
            columns: headings; that of a column of numbers starts with ``>``, of short names with ``|``.
        """
        self.caption = ""
        self._title = title
        self._columns = columns
        self._rows: list[tuple[str | Text, ...]] = []

    def __len__(self) -> int:
        return len(self._columns)

    def __bool__(self) -> bool:
        return bool(self._rows or self.caption)

    def add(self, *cells: str | Text) -> None:
        self._rows.append(tuple(map(_cut, cells)))

    def rest(self, left: int, where: str = "") -> None:
        """Adds the row that says how many more there are."""
        if left > 0:
            self.add(*[""] * (len(self) - 1), Text(f"and {left:,} more{where}", style="dim"))

    def table(self, width: int) -> tuple[Table, int, str]:
        """Lays it out, without the columns that can be spared where there is no room; no number is cut.

        Args:
            width: columns of the terminal.

        Returns:
            The table, the columns of the terminal that it takes, and what is said below it.
        """
        kept = list(range(len(self)))
        for name in _SPARE:
            if self._least(kept) > width:
                kept = [index for index in kept if self._heading(index) != name]
        made = Table(
            title=self._title,
            title_style="bold",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
            header_style="dim",
        )
        for index in kept:
            justify: Literal["left", "right"] = "right" if self._columns[index].startswith(">") else "left"
            made.add_column(self._heading(index), justify=justify, no_wrap=self._whole(index), overflow="fold")
        for row in self._rows:
            made.add_row(*(row[index] for index in kept))
        spared = [self._heading(index) for index in range(len(self)) if index not in kept]
        below = [self.caption, f"left out at {width} columns: {', '.join(spared)}" if spared else ""]
        return made, max(width, self._least(kept)), "\n".join(filter(None, below))

    def _heading(self, index: int) -> str:
        return self._columns[index].lstrip(">|")

    def _whole(self, index: int) -> bool:
        return self._columns[index][0] in ">|"

    def _least(self, kept: Sequence[int]) -> int:
        needed = 2 * (len(kept) - 1)
        for index in kept:
            cells = [self._heading(index), *(str(row[index]) for row in self._rows)]
            widest = max(cell_len(line) for cell in cells for line in cell.splitlines() or [""])
            needed += widest if self._whole(index) else min(widest, _READABLE)
        return needed


def _cut(shown: T) -> T:
    """Cuts the middle out of names that would fill screens."""
    if isinstance(shown, str):
        return shortened(shown)  # type: ignore[return-value]  # what came goes
    if isinstance(shown, Text) and (short := shortened(shown.plain)) != shown.plain:
        return Text(short, shown.style)  # type: ignore[return-value]  # likewise
    return shown


def show(out: Console, *sheets: Sheet | None) -> None:
    """Prints tables that have rows or a caption, each followed by an empty line.

    The terminal breaks lines that it cannot hold.
    """
    room = out.width
    for sheet in sheets:
        if sheet:
            made, out.width, below = sheet.table(room)
            out.print(made)
            out.width = room
            if below:
                out.print(Text(below, style="dim"))
            out.print()


def print_json(document: object, *, quiet: bool = False) -> None:
    """Prints plain data as JSON, on lines that are as long as they are."""
    console(quiet=quiet).out(json.dumps(document, indent=2, allow_nan=False))


class _Lines:
    """Says now and then what is being done, where stderr is a file or a pipe: silence looks like a hang."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tell(self) -> None:
        while not self._ended.wait(SECONDS):
            with suppress(OSError, ValueError):  # nobody reads it any more
                sys.stderr.write(f"... {printable(self.text)}\n")
                sys.stderr.flush()


@contextmanager
def working(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows a spinner on a terminal, elsewhere a line now and then; gives a function that changes its text."""
    if quiet:
        yield lambda changed: None
    elif not sys.stderr.isatty():
        with _Lines(text) as lines:
            yield lambda changed: setattr(lines, "text", changed)
    else:
        with Console(stderr=True, highlight=False, markup=False).status(text) as status:
            yield status.update


def count_bar(text: str, unit: str, *, quiet: bool) -> AbstractContextManager[Told | None]:
    """Shows how many things are done, with the time left; gives what tells it how many, and of how many."""
    columns = (MofNCompleteColumn(), TextColumn(unit))
    return _bar(text, columns, lambda done, total: f"{done:,} of {total:,} {unit}", quiet=quiet)


def byte_bar(text: str, *, quiet: bool) -> AbstractContextManager[Told | None]:
    """Shows how many bytes are done, with the time left; gives what tells it bytes done and bytes in all."""
    columns = (DownloadColumn(), TransferSpeedColumn())
    return _bar(text, columns, lambda done, total: f"{nbytes(done)} of {nbytes(total)}", quiet=quiet)


@contextmanager
def _bar(
    text: str, columns: Sequence[ProgressColumn], said: Callable[[int, int], str], *, quiet: bool
) -> Iterator[Told | None]:
    """Shows a bar on a terminal, elsewhere a line now and then."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        with _Lines(text) as lines:
            yield lambda done, total: setattr(lines, "text", f"{text}, {said(done, total)}")
    else:
        shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
        with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(text, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

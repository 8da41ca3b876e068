"""How sizes, figures, lists and names are said, wherever people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_LONG = re.compile(r"\S{300,}")
_ENDS = 100
_NUMBERS = re.compile(r"([0-9]{1,18})")


def printable(text: str) -> str:
    """Returns a text that a terminal can show: names in a model may hold anything, its control codes too."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """Returns a text without the middle of words that are longer than any name."""
    return _LONG.sub(lambda found: f"{found[0][:_ENDS]}...{found[0][-_ENDS:]}", text)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Returns a key that sorts names as people do: layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in _NUMBERS.split(name)]


def nbytes(count: float) -> str:
    """Returns a size as people say it, in three significant figures: 813 kB, 13.2 GB, 8.24 MB."""
    unit = 0
    while count >= 999.5 and unit < 4:
        count, unit = count / 1000, unit + 1
    digits = 0 if not unit or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def figure(value: float | None, form: str = ".3g") -> str:
    """Returns a figure of a table; a dash where there is none."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)


def shrink(before: int, after: int) -> str:
    """Returns ``51.0 GB -> 13.2 GB (3.9x smaller)``."""
    text = f"{nbytes(before)} -> {nbytes(after)}"
    if not before or not after:
        return text
    smaller = after < before
    times = f"{before / after if smaller else after / before:.1f}"
    return text if times == "1.0" else f"{text} ({times}x {'smaller' if smaller else 'larger'})"


def plural(count: int, one: str, many: str = "") -> str:
    """Returns how many there are, as ``1 weight`` or ``2 weights``; ``many`` where that is not ``one`` and an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def names(items: Sequence[str], word: str = "and") -> str:
    """Returns ``a, b and c``."""
    *most, last = items
    return f"{', '.join(most)} {word} {last}" if most else last

"""Located contents: what a value holds, and along which of its dimensions tokens, slots, experts and features lie.

One fact, ``Located``, says both: its content is stated by the other families; its axes are moved about here, by every
movement operator alike. So a spelling with rows (token, slot), a stack of experts or one expert alone is the same
content on other axes, and layouts and contents add instead of multiplying.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rewriter.facts.integers import Shaped
from rewriter.facts.size import ONE, Dims, Integers, Size

Kind = Literal["token", "slot", "expert", "feature", "outer", "inner", "weight", "row", "group", "coordinate", "repeat"]


@dataclass(frozen=True)
class Atom:
    """One index of a content.

    Attributes:
        kind: ``token``: part of the token index; ``slot``: which of a token's k experts; ``expert``: which of all E;
            ``feature``; ``outer`` and ``inner``: features cut in two indices; ``weight``: a dimension of a gathered
            weight; ``row``: (token, slot) pairs in the order of their experts; ``group``: the rows of one expert;
            ``coordinate``: which dimension a position is of; ``repeat``: nothing depends on it.
        size: how many positions.
        index: of a token index, which of them; of a weight, its axis in the stack; of a group, its expert; of rows, a
            number that is their router's.
    """

    kind: Kind
    size: Size
    index: int = 0


Dim = tuple[Atom, ...]
Axes = tuple[Dim, ...]


class Content:
    """What a value holds; immutable, compared by what it says."""

    def fix(self, atom: Atom, position: int) -> Content | None:
        """Returns the content at one position of an index, or None where it has no name."""
        return self if atom.kind == "repeat" else None

    def part(self, atom: Atom, start: int, count: int, step: int) -> Content | None:
        """Returns the content at evenly stepping positions of an index, or None where it has no name."""
        return self if atom.kind == "repeat" else None


@dataclass(frozen=True)
class Located(Shaped):
    """A value's content and where its indices lie: one tuple of indices per dimension, empty for an extent of 1."""

    content: Content
    axes: Axes

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.axes)

    @property
    def dims(self) -> Dims:
        """The extents."""
        return tuple(total(dim) for dim in self.axes)

    @property
    def integers(self) -> Integers | None:
        """The elements of a vector of one integer."""
        if not isinstance(self.content, Uniform) or self.rank != 1 or not self.content.value.is_integer():
            return None
        count = total(self.axes[0]).constant
        return None if count is None else Integers((Size(int(self.content.value)),) * count)


@dataclass(frozen=True)
class Pieces:
    """The parts in a sequence that SplitToSequence made."""

    items: tuple[Located, ...]


@dataclass(frozen=True)
class Uniform(Content):
    """The same number everywhere."""

    value: float


@functools.cache
def feature(size: int) -> Dim:
    """Returns a dimension of ``size`` features."""
    return (Atom("feature", Size.of(size)),)


def tokens(sizes: Iterable[Size]) -> Axes:
    """Returns the token indices of leading dimensions: one for each unknown extent in them, counted through."""
    dims = []
    count = 0
    for size in sizes:
        parts = [Size(1, (symbol,)) for symbol in size.symbols]
        parts = parts if size.factor == 1 else [Size(size.factor), *parts]
        dims.append(tuple(Atom("token", part, count + i) for i, part in enumerate(parts)))
        count += len(parts)
    return tuple(dims)


def total(dim: Sequence[Atom]) -> Size:
    """Returns the extent of a dimension."""
    if len(dim) == 1:
        return dim[0].size
    size = ONE
    for atom in dim:
        size *= atom.size
    return size


def unify(a: Axes, b: Axes) -> Axes | None:
    """Returns the axes of an elementwise operator on ``a`` and ``b``, or None where they do not fit by meaning."""
    rank = max(len(a), len(b))
    dims = []
    for first, second in zip(((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b, strict=True):
        dim = unify_dim(first, second)
        if dim is None:
            return None
        dims.append(dim)
    wide = [dim for dim in dims if dim and dim[0].kind != "repeat"]
    twice = len(wide) > 1 and any(dim in wide[:at] for at, dim in enumerate(wide))
    return None if twice else tuple(dims)  # an index is that of one dimension


def unify_dim(a: Dim, b: Dim) -> Dim | None:
    """As ``unify``, of one dimension."""
    if a == b or not b:
        return a
    if not a:
        return b
    for loose, other in ((a, b), (b, a)):
        if all(atom.kind == "repeat" for atom in loose) and total(loose) == total(other):
            return other
    if len(a) != len(b):
        return None
    atoms = tuple(_unify_atom(first, second) for first, second in zip(a, b, strict=True))
    return None if None in atoms else tuple(atom for atom in atoms if atom is not None)


def _unify_atom(a: Atom, b: Atom) -> Atom | None:
    if a == b:
        return a
    if a.size != b.size:
        return None
    if "repeat" in (a.kind, b.kind):
        return b if a.kind == "repeat" else a
    return replace(a, kind="feature", index=0) if {a.kind, b.kind} == {"feature", "weight"} else None


def fits(shape: Sequence[int], axes: Axes) -> bool:
    """Whether a constant of ``shape`` broadcasts into ``axes`` without enlarging any of them."""
    if len(shape) > len(axes):
        return False
    return all(n == 1 or total(dim).constant == n for n, dim in zip(reversed(shape), reversed(axes), strict=False))


def reshape(axes: Axes, shape: Sequence[Size | None]) -> Axes | None:
    """Returns the axes in another shape (None is the rest), or None where an index would have to be cut."""
    atoms = list(itertools.chain.from_iterable(axes))
    rest = shape.index(None) if None in shape else len(shape)
    front = [_take(atoms, size, 0) for size in shape[:rest]]
    back = [_take(atoms, size, -1) for size in reversed(shape[rest + 1 :])]
    if None in front or None in back:
        return None
    dims = [*front, *([tuple(atoms)] if rest < len(shape) else []), *reversed(back)]
    if rest == len(shape) and total(atoms) != ONE:
        return None
    return tuple(_rejoined(dim) for dim in dims if dim is not None)


def _rejoined(dim: Dim) -> Dim:
    """Features that were cut in two and are one index again."""
    kinds = tuple(atom.kind for atom in dim)
    return (Atom("feature", total(dim)),) if kinds == ("outer", "inner") else dim


def _take(atoms: list[Atom], size: Size | None, end: int) -> Dim | None:
    """Takes indices off one end until they make up ``size``."""
    taken: list[Atom] = []
    if size == ONE and atoms and atoms[end].size == ONE:
        return (atoms.pop(end),)
    while size is not None and total(taken) != size:
        if not atoms:
            return None
        taken.append(atoms.pop(end))
        excess = math.prod(a.size.constant or 0 for a in taken)
        if size.constant is not None and excess > size.constant:
            cut = _cut_in_two(taken.pop(), excess, size.constant, end)
            if cut is None:
                return None
            taken.append(cut[end])
            atoms.insert(0 if end == 0 else len(atoms), cut[-1 - end])
    return tuple(taken if end == 0 else reversed(taken))


def _cut_in_two(atom: Atom, excess: int, wanted: int, end: int) -> tuple[Atom, Atom] | None:
    """The indices that features are cut into, where the one at that end is to be so many times smaller."""
    other = excess // wanted
    if atom.kind != "feature" or excess % wanted or atom.size.constant is None or atom.size.constant % other:
        return None
    sizes = (atom.size.constant // other, other) if end == 0 else (other, atom.size.constant // other)
    return Atom("outer", Size(sizes[0])), Atom("inner", Size(sizes[1]))


def only(dim: Dim, kind: Kind) -> Atom | None:
    """Returns the one index of a dimension, where it has one and it is of that kind."""
    return dim[0] if len(dim) == 1 and dim[0].kind == kind else None


def find(axes: Axes, kind: Kind) -> int | None:
    """Returns the dimension that is one index of that kind and no other, or None."""
    found = [position for position, dim in enumerate(axes) if only(dim, kind)]
    return found[0] if len(found) == 1 else None


def put(axes: Axes, position: int, *dims: Dim) -> Axes:
    """Returns the axes with other dimensions in place of one."""
    return (*axes[:position], *dims, *axes[position + 1 :])

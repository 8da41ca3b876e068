"""Rows of (token, slot) pairs sorted by expert: what their indices hold, and what they take from other values."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.rules.blocks.axes import Atom, Content, Dim, Located, only, total, unify
from rewriter.rules.blocks.contents import Features, Output, Router
from rewriter.rules.blocks.mixing import Chosen


@dataclass(frozen=True)
class Sorted(Content):
    """The chosen experts in ascending order, one for each row, under a function that is given by its values.

    Attributes:
        router: what chose.
        values: what expert e has become.
    """

    router: Router
    values: tuple[float, ...]


@dataclass(frozen=True)
class Order(Content):
    """Which (token, slot) pair each row is; ``pairs`` is the dimension that it indexes."""

    router: Router
    pairs: Dim


@dataclass(frozen=True)
class RowToken(Content):
    """Which token each row is of; ``tokens`` is the dimension that it indexes.

    Attributes:
        router: what chose.
        tokens: the dimension.
        exact: whether it is rounded down already.
    """

    router: Router
    tokens: Dim
    exact: bool = True


@dataclass(frozen=True)
class NotNegative(Content):
    """The sign of a row's token: 1, or 0 for token 0."""


@dataclass(frozen=True)
class RowSlot(Content):
    """Which slot each row is of."""

    router: Router


@dataclass(frozen=True)
class Counts(Content):
    """How many rows each expert has; where they end, once ``cumulated``."""

    router: Router
    cumulated: bool = False

    def fix(self, atom: Atom, position: int) -> Content | None:
        if atom.kind != "expert":
            return super().fix(atom, position)
        return End(self.router, position) if self.cumulated else Count(self.router, position)


@dataclass(frozen=True)
class Count(Content):
    """How many rows an expert has."""

    router: Router
    expert: int


@dataclass(frozen=True)
class End(Content):
    """Where the rows of an expert end."""

    router: Router
    expert: int


@dataclass(frozen=True)
class Group(Content):
    """The rows of an expert, by their numbers."""

    router: Router
    expert: int


@dataclass(frozen=True)
class Arange(Content):
    """0, 1, 2 .. as far as it goes."""


@dataclass(frozen=True)
class Pick(Content):
    """Each token and an expert that it chose, as two coordinates.

    Attributes:
        router: what chose.
        slot: which slot's expert; None where there is a slot index.
        expert: which of the coordinates is the expert's.
    """

    router: Router
    slot: int | None
    expert: int


@dataclass(frozen=True)
class Inverse(Content):
    """Which row each (token, slot) pair is; ``pairs`` is the dimension that it lies along."""

    router: Router
    pairs: Dim


def row(router: Router, pairs: Dim) -> Atom:
    """Returns the index of sorted rows."""
    return Atom("row", total(pairs), id(router.node))


def gathered_rows(data: Located, index: Located) -> Located | None:
    """Returns rows taken along the first dimension by an order, a group or the way back; None for any other index."""
    held = index.content
    if not data.rank:
        return None
    first, rest = data.axes[0], data.axes[1:]
    if isinstance(held, Order):
        taken = unify((first,), (held.pairs,)) == (held.pairs,)
    elif isinstance(held, RowToken):
        taken = held.exact and first == held.tokens
    elif isinstance(held, Group | Inverse):
        atom = only(first, "row")
        taken = atom is not None and atom.index == id(held.router.node)
    else:
        return None
    if not taken:
        return None
    content = of_expert(data.content, held.expert) if isinstance(held, Group) else data.content
    return Located(content, (*index.axes, *rest))


def chosen_of(index: Located) -> Located | None:
    """Returns sorted experts as the choice that they are, row by row."""
    held = index.content
    if not isinstance(held, Sorted) or held.values != tuple(float(e) for e in range(held.router.experts)):
        return None
    return Located(Chosen(held.router), index.axes)


def of_expert(held: Content, expert: int) -> Content:
    """Returns the content on the rows of one expert, all of whose weights are that expert's."""
    if isinstance(held, Output):
        return held.expert(expert)
    if not isinstance(held, Features):
        return held
    return held.each(lambda linear: linear.expert(expert))

"""The forms that weights may have under a budget, and the choice among them.

Weights that must be alike (the experts of a layer) or that are (one role in one layer) form a group. Of all choices of
one form for each group whose bytes fit, that of least error is taken: a multiple-choice knapsack, solved group by group
over the bytes that those before leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from rewriter.errors import UsageError
from rewriter.quantize.types import WeightSpec

UNITS = 1 << 15
"""Parts of the bytes over the smallest forms that are told apart; a form takes as many as it touches."""

FINE = 10_000
"""Parts of a size below which fewer bytes are not looked for."""

BESIDE = (0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.25)
"""Sizes that are told beside a chosen one, as shares of it."""


@dataclass(frozen=True)
class Form:
    """One form that a group may have.

    Attributes:
        spec: bits, block size, zero points.
        nbytes: what it takes, with what the graph takes more where experts of this form are not fused.
        error: what it is expected to lose.
    """

    spec: WeightSpec
    nbytes: int
    error: float


@dataclass(frozen=True)
class Group:
    """Weights that get one form.

    Attributes:
        role: glob on their role.
        layer: index of their layer, or None.
        forms: from the fewest bytes on, each with less error than the one before.
        count: how many weights.
    """

    role: str
    layer: int | None
    forms: tuple[Form, ...]
    count: int = 1


@dataclass(frozen=True)
class Choice:
    """What a budget chose.

    Attributes:
        forms: of each group.
        nbytes: of the whole model, as expected.
        error: sum of the groups' expected errors.
    """

    forms: Mapping[Group, Form]
    nbytes: int
    error: float


@dataclass(frozen=True)
class Budget:
    """The groups of a model's weights, and what the rest of it takes.

    Attributes:
        groups: in the order of the model.
        elements: numbers in all of them.
        rest: bytes of what is not quantized, and of the graph.
        tokens: on how many tokens it was measured what an error of each role does to the model's output, so that errors
            are KL divergences; 0 where they are weighed by what is known of other models.
    """

    groups: tuple[Group, ...]
    elements: int
    rest: int
    tokens: int = 0

    def choose(self, nbytes: int) -> Choice:
        """Returns the forms of least error whose model takes at most ``nbytes``.

        Raises:
            UsageError: the smallest forms take more.
        """
        self.require(nbytes)
        spare = min(nbytes, self.largest) - self.smallest
        unit = max(1, -(-spare // UNITS))
        room = spare // unit
        least_error = np.zeros(room + 1)  # [bytes that may be used]
        taken = []
        for group in self.groups:
            errors = np.full((len(group.forms), room + 1), np.inf)
            for index, form in enumerate(group.forms):
                more = -(-(form.nbytes - group.forms[0].nbytes) // unit)
                if more <= room:
                    errors[index, more:] = least_error[: room + 1 - more] + form.error
            taken.append(errors.argmin(axis=0))
            least_error = errors.min(axis=0)
        forms = {}
        for group, index_of in zip(reversed(self.groups), reversed(taken), strict=True):
            form = group.forms[int(index_of[room])]
            room -= -(-(form.nbytes - group.forms[0].nbytes) // unit)
            forms[group] = form
        forms = {group: forms[group] for group in self.groups}
        used = self.rest + sum(form.nbytes for form in forms.values())
        return Choice(forms, used, sum(form.error for form in forms.values()))

    def require(self, nbytes: int) -> None:
        """Raises UsageError where the smallest forms take more than ``nbytes``."""
        if self.smallest > nbytes:
            least, most = (f"{size:,} ({self.bits_of(size):.2f} bits)" for size in (self.smallest, self.largest))
            raise UsageError(
                f"a budget of {nbytes:,} bytes is too small: the smallest forms take {least}, the largest {most}"
            )

    def reach(self, error: float) -> Choice:
        """Returns the forms of fewest bytes that are expected to lose at most ``error``.

        Raises:
            UsageError: the largest forms lose more.
        """
        enough = self.choose(self.largest)
        if enough.error > error:
            raise UsageError(
                f"the largest forms, {self.largest:,} bytes, are expected to lose {enough.error:.2g}, more than"
                f" {error:.2g}; ask for less, or leave more weights in float (quantization.exclude)"
            )
        low, high = self.smallest, enough.nbytes
        while high - low > high // FINE:  # the fewer the bytes, the more is lost
            middle = (low + high) // 2
            choice = self.choose(middle)
            if choice.error > error:
                low = middle + 1
            else:
                enough, high = choice, min(middle, choice.nbytes)
        return enough

    def beside(self, nbytes: int) -> tuple[Choice, ...]:
        """Returns what about as many bytes would give, the fewest first."""
        found: dict[int, Choice] = {}
        for share in BESIDE:
            total = int(nbytes * share)
            if self.smallest <= total:
                choice = self.choose(total)
                found.setdefault(choice.nbytes, choice)
        return tuple(found[size] for size in sorted(found))

    @property
    def smallest(self) -> int:
        """Bytes of the model with the smallest form of every group."""
        return self.rest + sum(group.forms[0].nbytes for group in self.groups)

    @property
    def largest(self) -> int:
        """Bytes of the model with the largest form of every group."""
        return self.rest + sum(group.forms[-1].nbytes for group in self.groups)

    def bytes_of(self, bits: float) -> int:
        """Returns the bytes of a model whose quantized weights take ``bits`` each, scales and zero points included."""
        return self.rest + int(self.elements * bits / 8)

    def bits_of(self, nbytes: int) -> float:
        """Inverse of ``bytes_of``."""
        return 8 * (nbytes - self.rest) / self.elements


def worth_taking(forms: Iterable[Form]) -> tuple[Form, ...]:
    """Returns the forms, from the fewest bytes on, that lose less than every smaller one."""
    kept: list[Form] = []
    for form in sorted(forms, key=lambda f: (f.nbytes, f.error)):
        if not kept or form.error < kept[-1].error:
            kept.append(form)
    return tuple(kept)

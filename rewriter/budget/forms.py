"""The forms that weights may have under a budget, and the choice among them.

Weights that must be alike (the experts of a layer) or that are (one role in one layer) form a group. Starting from the
fewest bytes, the step that saves most error for each byte is taken again and again, for as long as it fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewriter.errors import UsageError
from rewriter.quantize.types import WeightSpec


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
        forms: from the fewest bytes on, each with less error for each byte than the step before.
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
        place = dict.fromkeys(self.groups, 0)
        used = self.smallest
        if used > nbytes:
            least, most = (f"{size:,} ({self.bits_of(size):.2f} bits)" for size in (used, self.largest))
            raise UsageError(
                f"a budget of {nbytes:,} bytes is too small: the smallest forms take {least}, the largest {most}"
            )
        steps = [
            ((a.error - b.error) / (b.nbytes - a.nbytes), number, index, group)
            for number, group in enumerate(self.groups)
            for index, (a, b) in enumerate(zip(group.forms, group.forms[1:], strict=False), 1)
        ]
        for _, _, index, group in sorted(steps, key=lambda step: (-step[0], *step[1:3])):
            more = group.forms[index].nbytes - group.forms[index - 1].nbytes
            if place[group] == index - 1 and used + more <= nbytes:
                place[group] = index
                used += more
        forms = {group: group.forms[index] for group, index in place.items()}
        return Choice(forms, used, sum(form.error for form in forms.values()))

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


def convex_hull(forms: Iterable[Form]) -> tuple[Form, ...]:
    """Returns the forms on the lower convex hull of error over bytes: no budget would take another."""
    hull: list[Form] = []
    for form in sorted(forms, key=lambda f: (f.nbytes, f.error)):
        if hull and form.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], form):
            hull.pop()
        if hull and hull[-1].nbytes == form.nbytes:
            hull.pop()
        hull.append(form)
    return tuple(hull)


def _gain(a: Form, b: Form) -> float:
    return (a.error - b.error) / max(b.nbytes - a.nbytes, 1)

"""What a budget is asked for: a size of the whole model, of its weights, or a KL divergence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewriter.budget.forms import Budget, Choice
from rewriter.errors import UsageError
from rewriter.text import nbytes

MARGIN = 0.8
"""Share of a KL divergence that is aimed at: on other tokens than the calibration's up to a fifth more was measured."""

MORE_AIMS = 4
"""How often forms are chosen anew, aimed lower, where more than the KL divergence asked for was measured."""

_FURTHER = 0.9
"""What is measured falls more slowly than what is expected: so much lower than in proportion is aimed."""


@dataclass(frozen=True)
class Goal:
    """What the choice of forms is asked for: exactly one of a size, bits per number, or a KL divergence.

    Attributes:
        nbytes: the model is to take no more.
        bits: a quantized weight is to take no more, scales and zero points included.
        kl: the model is to lose no more, in nats.
        share: of the KL divergence that is aimed at.
    """

    nbytes: int | None = None
    bits: float | None = None
    kl: float | None = None
    share: float = MARGIN

    def lower(self, measured: float) -> Goal:
        """Returns the same goal aimed at lower, by a little more than a measured KL divergence exceeds it."""
        return self if self.kl is None else replace(self, share=self.share * _FURTHER * self.kl / measured)

    def __str__(self) -> str:
        if self.kl is not None:
            return f"a KL of at most {self.kl:g} (aimed at {self.kl * self.share:.3g})"
        return f"at most {nbytes(self.nbytes)}" if self.nbytes is not None else f"at most {self.bits:g} bits a weight"

    def total(self, budget: Budget) -> int | None:
        """Returns the bytes that the model may take; None where the goal is a KL divergence."""
        return self.nbytes if self.bits is None else budget.bytes_of(self.bits)

    def require(self, budget: Budget) -> None:
        """Raises UsageError where the smallest forms take too much."""
        total = self.total(budget)
        if total is not None:
            budget.require(total)

    def choose(self, budget: Budget) -> Choice:
        """Returns the best forms.

        Raises:
            UsageError: none are good or small enough, or no KL divergence is known.
        """
        if self.kl is None:
            return budget.choose(self.total(budget) or 0)
        if not budget.tokens:
            raise UsageError(
                "no KL divergence is known of this model: it takes a calibration on tokens, an output named logits,"
                " and a runtime on this machine that runs the model; give --size instead"
            )
        return budget.reach(self.kl * self.share)

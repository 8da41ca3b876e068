"""Why a model has the size that it has: what was asked for, and what other sizes would have given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeGiven:
    """What one choice of forms is expected to give.

    Attributes:
        nbytes: of all files of the model.
        bits: of each quantized weight, scales and zero points included.
        error: expected KL divergence in nats; where none is known, the error relative to the chosen forms'.
        chosen: whether it is the one that was taken.
    """

    nbytes: int
    bits: float
    error: float
    chosen: bool = False


@dataclass(frozen=True)
class Sized:
    """What a budget chose.

    Attributes:
        asked: what it was asked for, in words.
        tokens: tokens on which it was measured what errors do to the model's output; 0 where no KL divergence is known.
        sizes: the chosen one and some beside it, the fewest bytes first.
    """

    asked: str
    tokens: int
    sizes: tuple[SizeGiven, ...]

    @property
    def chosen(self) -> SizeGiven:
        return next(size for size in self.sizes if size.chosen)

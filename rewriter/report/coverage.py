"""How many tokens the experts of a model saw when it was calibrated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCoverage:
    """The experts behind one router.

    Attributes:
        layer: index of the layer, or None.
        features: H, what the first projection of an expert reads.
        counts: tokens that each expert saw, [E].
    """

    layer: int | None
    features: int
    counts: tuple[int, ...]

    @property
    def none(self) -> int:
        """Experts that saw no token."""
        return self.counts.count(0)

    @property
    def few(self) -> int:
        """Experts that saw fewer tokens than they have input features: too few to tell how the features belong."""
        return sum(count < self.features for count in self.counts)

    @property
    def median(self) -> int:
        """Tokens of the expert in the middle."""
        return sorted(self.counts)[len(self.counts) // 2]

    @property
    def least(self) -> tuple[int, ...]:
        """The experts, those that saw the fewest tokens first."""
        return tuple(sorted(range(len(self.counts)), key=lambda expert: (self.counts[expert], expert)))


@dataclass(frozen=True)
class Coverage:
    """What a calibration saw.

    Attributes:
        model: what was run.
        tokens: how many were run.
        weights: how many stored tensors are known.
        blocks: by layer.
    """

    model: str
    tokens: int
    weights: int
    blocks: tuple[BlockCoverage, ...]

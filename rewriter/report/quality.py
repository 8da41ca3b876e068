"""How well a rewritten language model predicts tokens, beside the original: with how sure that is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval.

    Attributes:
        value: over all tokens that were measured.
        low: where the interval begins; None where a single sequence tells nothing of others.
        high: where it ends; None as above.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Quality:
    """Two language models on the same tokens.

    The intervals are those within which the figures would lie on other sequences of the same kind: the sequences are
    drawn anew, with repetition, many times.

    Attributes:
        runtime: what ran them.
        sequences: how many were run.
        tokens: positions at which the distributions were compared.
        perplexity_before: of the original: e to the mean negative log-likelihood of each next token.
        perplexity_after: of the rewritten model.
        perplexity_increase: after over before, less 1; its interval is that of the pair, which is far narrower.
        kl: mean over positions of KL(before || after), in nats.
        kl_p99: the KL divergence that 99 of 100 positions do not exceed.
        top1: share of positions at which the most likely token is the same.
        failures: limits that do not hold.
    """

    runtime: str
    sequences: int
    tokens: int
    perplexity_before: Estimate
    perplexity_after: Estimate
    perplexity_increase: Estimate
    kl: Estimate
    kl_p99: Estimate
    top1: Estimate
    failures: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[tuple[str, Estimate, str], ...]:
        """What people read: name, figure, and how it is formatted."""
        return (
            ("perplexity before", self.perplexity_before, ".4f"),
            ("perplexity after", self.perplexity_after, ".4f"),
            ("perplexity increase", self.perplexity_increase, "+.2%"),
            ("KL, mean", self.kl, ".4f"),
            ("KL, 99th percentile", self.kl_p99, ".4f"),
            ("same most likely token", self.top1, ".2%"),
        )

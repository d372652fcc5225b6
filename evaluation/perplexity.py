"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, each given those before it.

The mean is over tokens, not over texts or batches, so that it does not depend on how texts are cut or put together.
Its interval resamples whole texts: tokens of one text are no independent draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Definitions = dict[str, tuple[str, str, str]]
"""Name → (unit, direction, description)."""
_LEVEL = (0.025, 0.975)
_AT_ONCE = 100


def metrics(of: str, prefix: str = "") -> Definitions:
    """What is measured.

    Args:
        of: The texts, in words.
        prefix: Of the names.
    """
    exp, end = f"exp of the loss on {of}", "end of the 95% bootstrap interval over texts"
    return {
        f"{prefix}perplexity": ("1", "lower", exp),
        f"{prefix}perplexity_low": ("1", "none", f"{exp}; lower {end}"),
        f"{prefix}perplexity_high": ("1", "none", f"{exp}; upper {end}"),
        f"{prefix}loss": ("nats per token", "lower", f"Negative log-likelihood of {of}, mean over tokens"),
    }


@dataclass(frozen=True)
class LossSum:
    """Negative log-likelihood over some tokens.

    Attributes:
        nats: Sum.
        tokens: How many.
    """

    nats: float = 0.0
    tokens: int = 0

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Nats per token; nan over nothing."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Exp of the mean; inf where that is too large for a float."""
        return _exp(self.mean)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def perplexity_interval(by_text: Sequence[LossSum], *, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the perplexity, over texts: whole texts are drawn again, with their tokens.

    Percentiles, so that the interval of the perplexity is exp of that of the loss. It says how much other texts of the
    same kind would change the figure, as far as texts do not depend on each other; paragraphs of one book do.

    Args:
        by_text: Loss of each text.
        resamples: How many.
        seed: Same seed → same draws, so that the base and all arms meet the same ones.

    Returns:
        Lower and upper end; nan with fewer than two texts, or a loss that is not finite.
    """
    n = len(by_text)
    nats, tokens = (
        np.array(values, dtype=float) for values in zip(*((t.nats, t.tokens) for t in by_text), strict=True)
    )
    if n < 2 or not np.isfinite(nats).all():
        return math.nan, math.nan
    rng, means = np.random.default_rng(seed), []
    for start in range(0, resamples, _AT_ONCE):  # the counts of all resamples at once may be too large
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(_AT_ONCE, resamples - start))
        means.append((counts @ nats) / (counts @ tokens))
    low, high = np.quantile(np.concatenate(means), _LEVEL)
    return _exp(float(low)), _exp(float(high))


def token_losses(logits: Any, ids: Any, mask: Any, scored_from: Sequence[int]) -> list[LossSum]:
    """Loss of each text of a padded batch.

    Args:
        logits: Of a causal model, shape (B, T, vocabulary).
        ids: Token ids, shape (B, T), padded on the right.
        mask: 1 where there is a token, shape (B, T).
        scored_from: For each text the place of its first token that counts, ≥ 1: the one at 0 follows nothing.

    Returns:
        For each text the sum over the tokens from there to its end.
    """
    from torch.nn.functional import cross_entropy

    found = []
    # Text by text, so that no copy of all logits in float32 is held.
    for row, first in enumerate(scored_from):
        end = int(mask[row].sum())
        losses = cross_entropy(logits[row, first - 1 : end - 1].float(), ids[row, first:end], reduction="none")
        found.append(LossSum(float(losses.double().sum()), end - first))
    return found

"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, each given those before it.

The mean is over tokens, not over texts or batches, so that it does not depend on how texts are cut or put together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRICS = {
    "perplexity": ("1", "lower", "exp of the loss on held-out general text"),
    "loss": ("nats per token", "lower", "Negative log-likelihood of held-out general text, mean over tokens"),
}
"""Name → (unit, direction, description)."""


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
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf


def token_losses(logits: Any, ids: Any, mask: Any, scored_from: Sequence[int]) -> LossSum:
    """Loss of a padded batch.

    Args:
        logits: Of a causal model, shape (B, T, vocabulary).
        ids: Token ids, shape (B, T), padded on the right.
        mask: 1 where there is a token, shape (B, T).
        scored_from: For each text the place of its first token that counts, ≥ 1: the one at 0 follows nothing.

    Returns:
        Sum over the tokens from there to the text's end.
    """
    from torch.nn.functional import cross_entropy

    found = LossSum()
    # Text by text, so that no copy of all logits in float32 is held.
    for row, first in enumerate(scored_from):
        end = int(mask[row].sum())
        losses = cross_entropy(logits[row, first - 1 : end - 1].float(), ids[row, first:end], reduction="none")
        found += LossSum(float(losses.double().sum()), end - first)
    return found

"""Loss, perplexity, pooled hidden states and drift of a transformers model.

Layers are numbered as in transformers' `hidden_states`: 0 the embeddings, l the output of block l; the last one is
taken after the final norm. Perplexity is exp of the mean negative log-likelihood over tokens, not texts or batches; its
interval resamples whole texts, since tokens of one text are not independent.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Array = NDArray[np.float64]
_LEVEL = (0.025, 0.975)
_AT_ONCE = 100


def perplexity_metrics(of: str, prefix: str = "") -> dict[str, tuple[str, str, str]]:
    """Name → (unit, direction, description) of the perplexity of `of`."""
    exp, end = f"exp of the loss on {of}", "end of the 95% bootstrap interval over texts"
    return {
        f"{prefix}perplexity": ("1", "lower", exp),
        f"{prefix}perplexity_low": ("1", "none", f"{exp}; lower {end}"),
        f"{prefix}perplexity_high": ("1", "none", f"{exp}; upper {end}"),
        f"{prefix}loss": ("nats per token", "lower", f"Negative log-likelihood of {of}, mean over tokens"),
    }


@dataclass(frozen=True)
class Encoded:
    ids: tuple[int, ...]  # with BOS if the tokenizer sets one; at least two
    scored_from: int = 1  # position of the first token that counts in the loss, ≥ 1


@dataclass(frozen=True)
class LossSum:
    """Negative log-likelihood summed over tokens, in nats, and their number."""

    nats: float = 0.0
    tokens: int = 0

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Nats per token; nan without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Exp of the mean; inf if that is too large for a float."""
        return _exp(self.mean)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def perplexity_interval(by_text: Sequence[LossSum], *, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the perplexity over texts; nan with fewer than two, or if a loss is not finite.

    Percentiles, so that the interval of the perplexity is exp of that of the loss. It shows how much other texts of the
    same kind would change the figure, if texts are independent; paragraphs of one book are not. The same seed gives the
    base and all arms the same draws.
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
    """Loss of each text of a batch, over its tokens from `scored_from` (≥ 1: nothing predicts token 0) to its end.

    Shapes: logits (B, T, vocabulary); ids and mask (B, T), padded on the right.
    """
    from torch.nn.functional import cross_entropy

    sums = []
    # Text by text, to avoid a float32 copy of all logits.
    for row, first in enumerate(scored_from):
        end = int(mask[row].sum())
        losses = cross_entropy(logits[row, first - 1 : end - 1].float(), ids[row, first:end], reduction="none")
        sums.append(LossSum(float(losses.double().sum()), end - first))
    return sums


def layer_numbers(depths: Sequence[float], layers: int) -> list[int]:
    """Layers at these depths (shares of the model's `layers` blocks), without repeats, ascending."""
    return sorted({max(1, round(depth * layers)) for depth in depths})


def _batches(texts: Sequence[Encoded], size: int, model: Any) -> Iterator[tuple[list[int], Any, Any]]:
    """Yields (places, ids [B, T], attention mask [B, T]), padded on the right; texts of similar length together."""
    import torch

    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda place: len(texts[place].ids))
    for start in tqdm(range(0, len(order), size), desc="texts, in batches", delay=10):
        places = order[start : start + size]
        width = max(len(texts[place].ids) for place in places)
        ids = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            length = len(texts[place].ids)
            ids[row, :length] = torch.tensor(texts[place].ids)
            mask[row, :length] = 1
        yield places, ids.to(device), mask.to(device)


def pooled_states(
    model: Any, prompts: Sequence[Encoded], layers: Sequence[int], *, pooling: str, batch_size: int
) -> Array:
    """Hidden states of N prompts in L layers, shape (L, N, d); pooling: "mean" over all tokens, or the "last" token."""
    import torch

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = whole.base_model  # without the head, so no logits are computed; PEFT's layers are inside
    result: list[Any] = [None] * len(prompts)
    with torch.inference_mode():
        for places, ids, mask in _batches(prompts, batch_size, model):
            out = body(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            states = torch.stack([out.hidden_states[layer].float() for layer in layers], dim=1)  # [B, L, T, d]
            if pooling == "last":
                last = mask.sum(dim=1) - 1
                pooled = states[torch.arange(len(places), device=states.device), :, last]
            else:
                weights = (mask / mask.sum(dim=1, keepdim=True)).to(states.dtype)
                pooled = torch.einsum("bltd,bt->bld", states * mask[:, None, :, None], weights)
            for place, row in zip(places, pooled.cpu().numpy(), strict=True):
                result[place] = row
    return np.stack(result, axis=1).astype(np.float64)


@dataclass(frozen=True)
class TextFigures:
    by_text: list[LossSum]  # with the adapter, if the model has one
    base_loss: LossSum | None  # with the adapter off; None if there is none, or `against_base` was False
    relative: list[float]  # from layer 1 on: mean over the tokens of ‖h − h₀‖/‖h₀‖; empty if base_loss is None
    cosine: list[float]  # the same for 1 − cos(h, h₀)
    tokens: int  # all tokens of the texts, which the means are taken over

    @property
    def loss(self) -> LossSum:
        return sum(self.by_text, LossSum())


def score_texts(model: Any, texts: Sequence[Encoded], *, batch_size: int, against_base: bool = True) -> TextFigures:
    """Loss over texts, and drift of the hidden states between adapter off and on.

    Every batch is read twice if the model has PEFT's `disable_adapter`, unless `against_base` is False.
    """
    import torch

    adapted = against_base and hasattr(model, "disable_adapter")
    losses, base_losses, tokens = [LossSum()] * len(texts), [LossSum()] * len(texts), 0
    relative: Any = 0.0
    cosine: Any = 0.0

    def read(context: AbstractContextManager[Any], ids: Any, mask: Any, places: list[int]) -> tuple[list[LossSum], Any]:
        with context:
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=adapted, use_cache=False)
        return token_losses(out.logits, ids, mask, [texts[place].scored_from for place in places]), out.hidden_states

    with torch.inference_mode():
        for places, ids, mask in _batches(texts, batch_size, model):
            batch, states = read(nullcontext(), ids, mask, places)
            tokens += int(mask.sum())
            for place, loss in zip(places, batch, strict=True):
                losses[place] = loss
            if not adapted:
                continue
            base_batch, base_states = read(model.disable_adapter(), ids, mask, places)
            for place, loss in zip(places, base_batch, strict=True):
                base_losses[place] = loss
            real = mask.bool()
            drifts = [_drift(h[real], h0[real]) for h, h0 in zip(states[1:], base_states[1:], strict=True)]
            relative = relative + np.array([distance for distance, _ in drifts])
            cosine = cosine + np.array([angle for _, angle in drifts])
    if not adapted:
        return TextFigures(losses, None, [], [], tokens)
    return TextFigures(losses, sum(base_losses, LossSum()), list(relative / tokens), list(cosine / tokens), tokens)


def _drift(states: Any, base_states: Any) -> tuple[float, float]:
    """Sums over the tokens of ‖h − h₀‖/‖h₀‖ and of 1 − cos(h, h₀); states of shape [tokens, d]."""
    from torch.nn.functional import cosine_similarity

    h, h0 = states.double(), base_states.double()
    relative = (h - h0).norm(dim=1) / h0.norm(dim=1)
    return float(relative.sum()), float((1 - cosine_similarity(h, h0, dim=1)).sum())
